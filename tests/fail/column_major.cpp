// expect: [moeroute::view] rows must be contiguous: use Eigen::RowMajor
#include <moeroute/matrix/eigen.hpp>

void read(Eigen::MatrixXf& m) { moeroute::view(m); }
