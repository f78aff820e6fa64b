// expect: writable_rows
// expect: std::is_const_v
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/stage/combine.hpp>

void add_up(const moeroute::row_matrix<float>& slots, const moeroute::dispatch_plan& plan,
            const moeroute::assignment& choices, const moeroute::row_matrix<float>& y) {
  moeroute::combine(slots, plan, choices, y);
}
