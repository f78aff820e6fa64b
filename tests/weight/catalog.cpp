// A published router by its name.
#include <moeroute/policy/catalog.hpp>

const moeroute::catalog_entry* entry() { return moeroute::find_in_catalog("mixtral"); }
