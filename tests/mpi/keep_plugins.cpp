// Linked where a sanitizer looks for leaks: MPI's plugins stay loaded until the end, since what an
// unloaded one had allocated has no name that leaks.txt could know.
extern "C" int dlclose(void*) { return 0; }
