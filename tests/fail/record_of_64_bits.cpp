// expect: [moeroute::routing_record] ids are kept as uint8_t, uint16_t or int32_t
#include <moeroute/data/routing_record.hpp>

moeroute::routing_record<std::int64_t> ids;
