// expect: [moeroute::view] a temporary would dangle
#include <moeroute/matrix/eigen.hpp>

auto rows() { return moeroute::view(moeroute::row_matrix<float>(2, 3)); }
