// expect: [moeroute::view] rows must be contiguous: the inner stride must be 1
#include <moeroute/matrix/eigen.hpp>

void read(
    Eigen::Map<moeroute::row_matrix<float>, 0, Eigen::Stride<Eigen::Dynamic, 2>>& every_second) {
  moeroute::view(every_second);
}
