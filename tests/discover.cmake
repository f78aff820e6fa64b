# Makes every test case of a Catch2 program a test of ctest's. ctest reads this before each run, with
#   program  the program, full path
#   room     what its tests are about
#   emulator what runs it, empty on its own machine
#
# Titles are laws and speak of intervals, lists and signs: `-0 equals +0`, `ids in [-1, E)`. So no
# title passes through a CMake list, and Catch2 gets each of them quoted.
if(NOT EXISTS "${program}")
  add_test("${room}: not built" "${program}")
  return()
endif()
execute_process(
  COMMAND ${emulator} "${program}" --list-tests --verbosity quiet
  OUTPUT_VARIABLE titles
  RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  add_test("${room}: does not list its tests" "${program}" --list-tests)
endif()
while(titles MATCHES "^([^\n]+)\n(.*)$")
  set(title "${CMAKE_MATCH_1}")
  set(titles "${CMAKE_MATCH_2}")
  string(REGEX REPLACE "([\\\",])" "\\\\\\1" quoted "${title}")
  add_test("${room}: ${title}" ${emulator} "${program}" "\"${quoted}\"")
  set_tests_properties("${room}: ${title}" PROPERTIES SKIP_RETURN_CODE 4)
endwhile()
