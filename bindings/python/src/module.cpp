// moeroute for Python: the compiled library's calls on arrays of whatever speaks DLPack or the
// buffer protocol, without copying rows. What is wrong is a ValueError with the library's sentence.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <moeroute/compiled.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/spec_text.hpp>
#if MOEROUTE_PYTHON_JSON
#include <moeroute/json/config_json.hpp>
#endif

#include "python.hpp"

namespace nb = nanobind;
namespace mr = moeroute::compiled;

using namespace moeroute_python;

namespace {

// ---- arrays -------------------------------------------------------------------------------------

write_array output_of(const char* where, const char* name, nb::handle object) {
  write_array array;
  if (nb::try_cast(object, array, false)) {
    if (array.device_type() != nb::device::cpu::value)
      refuse(std::string("moeroute::") + where + ": " + name + " is not on the CPU");
    return array;
  }
  array_of(where, name, object);
  refuse(std::string("moeroute::") + where + ": " + name +
         " is read-only, expected one to write to");
}

template <class Array>
std::int32_t element_of(const char* where, const char* name, const Array& array) {
  const nb::dlpack::dtype type = array.dtype();
  if (type.lanes == 1) {
    if (type == nb::dtype<float>()) return MOEROUTE_FLOAT;
    if (type.bits == 16 && type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat))
      return MOEROUTE_BFLOAT16;
    if (type.bits == 16 && type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float))
      return MOEROUTE_FLOAT16;
    // NumPy has no bfloat16.
    if (type == nb::dtype<std::uint16_t>()) return MOEROUTE_BFLOAT16;
  }
  refuse(std::string("moeroute::") + where + ": " + name + " has elements of " +
         std::to_string(type.bits) +
         " bits of another kind, expected float32, bfloat16 or float16 " +
         "(uint16 is taken for bfloat16)");
}

// Sizes and stride of rows whose elements lie side by side.
template <class Array>
moeroute_const_matrix rows_of(const char* where, const char* name, const Array& array) {
  if (array.ndim() != 2)
    refuse(std::string("moeroute::") + where + ": " + name + " has " +
           std::to_string(array.ndim()) + " axes, expected 2");
  const auto rows = static_cast<std::int64_t>(array.shape(0)),
             cols = static_cast<std::int64_t>(array.shape(1));
  if (cols > 1 && rows > 0 && array.stride(1) != 1)
    refuse(std::string("moeroute::") + where + ": " + name + " has elements " +
           std::to_string(array.stride(1)) + " apart within a row, expected side by side");
  const std::int64_t stride = rows > 1 ? array.stride(0) : cols;
  if (rows > 1 && stride < cols)
    refuse(std::string("moeroute::") + where + ": " + name + " has rows " + std::to_string(stride) +
           " apart, expected at least " + std::to_string(cols));
  return {array.data(), rows, cols, stride, element_of(where, name, array)};
}

moeroute_matrix rows_to_write(const char* where, const char* name, write_array& array) {
  const moeroute_const_matrix m = rows_of(where, name, array);
  return {array.data(), m.rows, m.cols, m.stride, m.type};
}

// Rows that a call fills: those of `out`, or new ones of float.
struct result_rows {
  nb::object object;
  write_array array;
  moeroute_matrix rows{};
  result_rows(const char* where, nb::object out, std::int64_t r, std::int64_t c)
      : object(out.is_none() ? matrix_array<float>(nullptr, r, c) : std::move(out)),
        array(output_of(where, "out", object)),
        rows(rows_to_write(where, "out", array)) {}
};

// ---- routers ------------------------------------------------------------------------------------

// A model's name, a line of words, or a config as a dict.
moeroute::router_spec spec_of(nb::handle what, std::int64_t layer) {
  try {
    if (nb::isinstance<nb::str>(what)) {
      const std::string text = nb::cast<std::string>(what);
      if (const auto* entry = moeroute::find_in_catalog(text)) return entry->spec;
      if (text.find('=') == text.npos)
        refuse("moeroute::Router: " + moeroute::detail::unknown_model(text) +
               "; a router in words reads as E=64 k=6");
      return moeroute::parse_spec(text);
    }
    if (nb::isinstance<nb::dict>(what)) {
#if MOEROUTE_PYTHON_JSON
      const auto text = nb::cast<std::string>(nb::module_::import_("json").attr("dumps")(what));
      const auto routers = moeroute::routers_from_config(nlohmann::json::parse(text), "config");
      if (const auto spec = routers.of(layer)) return *spec;
      refuse("moeroute::Router: layer " + std::to_string(layer) + " of the config has no experts");
#else
      refuse("moeroute::Router: this build reads no configs: nlohmann-json was not found");
#endif
    }
  } catch (const nb::python_error&) {
    throw;
  } catch (const nb::builtin_exception&) {
    throw;
  } catch (const std::exception& e) {
    refuse(e.what());
  }
  refuse("moeroute::Router: the router is " + kind_of(what) +
         ", expected a model's name, a description or a config as a dict");
}

struct router {
  moeroute::router_spec spec;
  // What the library refers to; Python's objects, so that a bias may be written between calls.
  std::vector<read_array> kept{};
  std::unique_ptr<mr::router> made{};
};

struct assignment {
  mr::assignment choices{};
  mutable std::mutex mutex{};

  // A caller without the interpreter's lock may be writing.
  nb::object shaped(const auto& list) const {
    using value = std::remove_cvref_t<decltype(list(choices)[0])>;
    std::vector<value> copy;
    std::int64_t tokens = 0, k = 0;
    bool fixed = false;
    {
      // Who waits for the other lock must not hold the interpreter's.
      nb::gil_scoped_release others;
      const std::lock_guard alone(mutex);
      const auto all = list(choices);
      copy.assign(all.begin(), all.end());
      tokens = choices.tokens(), k = choices.k();
      fixed = choices.offsets().empty() && k > 0 && std::ssize(copy) == tokens * k;
    }
    if (fixed) return matrix_array(copy.data(), tokens, k);
    return list_array(copy.data(), std::ssize(copy));
  }
  nb::object ids() const {
    return shaped([](const auto& c) { return c.ids(); });
  }
  nb::object weights() const {
    return shaped([](const auto& c) { return c.weights(); });
  }
};

std::unique_ptr<router> new_router(nb::object what, nb::object bias, nb::object per_expert_scale,
                                   nb::object gamma, nb::object table, std::int64_t layer) {
  constexpr const char* where = "Router";
  auto made = std::make_unique<router>();
  made->spec = spec_of(what, layer);
  if (!mr::can_describe(made->spec))
    refuse("moeroute::Router: '" + moeroute::to_string(made->spec) +
           "' has words that the compiled library does not have");
  mr::tensors tensors;
  const auto floats = [&](const char* name, const nb::object& given) -> std::span<const float> {
    if (given.is_none()) return {};
    made->kept.push_back(array_of(where, name, given));
    return list_of<float>(where, name, "float32", made->kept.back());
  };
  tensors.bias = floats("bias", bias);
  tensors.per_expert_scale = floats("per_expert_scale", per_expert_scale);
  tensors.gamma = floats("gamma", gamma);
  if (!table.is_none()) {
    made->kept.push_back(array_of(where, "table", table));
    tensors.table = list_of<std::int32_t>(where, "table", "int32", made->kept.back());
  }
  made->made = std::make_unique<mr::router>(mr::describe(made->spec), tensors);
  return made;
}

nb::object route(const router& r, nb::object logits, nb::object mask, nb::object token_ids,
                 nb::object k_of_token, std::uint64_t seed, std::uint64_t step, nb::object out) {
  constexpr const char* where = "route";
  const read_array z = array_of(where, "logits", logits);
  const moeroute_const_matrix rows = rows_of(where, "logits", z);
  const optional_array m(where, "mask", mask), t(where, "token_ids", token_ids),
      k(where, "k_of_token", k_of_token);
  mr::side_inputs side{};
  side.mask = m.list<std::uint8_t>(where, "mask", "bool or uint8", rows.rows);
  side.token_ids = t.list<std::int32_t>(where, "token_ids", "int32", rows.rows);
  side.k_of_token = k.list<std::int32_t>(where, "k_of_token", "int32", rows.rows);
  side.seed = seed;
  side.step = step;
  if (out.is_none()) out = nb::cast(std::make_unique<assignment>());
  assignment* to = nullptr;
  if (!nb::try_cast(out, to))
    refuse("moeroute::route: out is " + kind_of(out) + ", expected an Assignment");
  {
    nb::gil_scoped_release others;
    const std::lock_guard alone(to->mutex);
    const int status = moeroute_route(r.made->get(), rows, &side, nullptr, to->choices.get());
    to->choices.refresh_after(status);
  }
  return out;
}

// ---- plans and rows -----------------------------------------------------------------------------

struct plan {
  mr::dispatch_plan slots{};
  std::mutex mutex{};
};

std::unique_ptr<plan> new_plan(assignment& a, std::int64_t block, std::int64_t capacity,
                               bool spare_tokens, nb::object owned, nb::object mask) {
  constexpr const char* where = "Plan";
  const optional_array o(where, "owned", owned), m(where, "mask", mask);
  mr::plan_options options{};
  options.block = block;
  options.capacity = capacity;
  options.spare_tokens = spare_tokens;
  auto made = std::make_unique<plan>();
  nb::gil_scoped_release others;
  const std::lock_guard alone(a.mutex);
  options.owned = o.list<std::uint8_t>(where, "owned", "bool or uint8", a.choices.experts());
  options.mask = m.list<std::uint8_t>(where, "mask", "bool or uint8", a.choices.tokens());
  mr::plan(a.choices, made->slots, options);
  return made;
}

nb::object dispatch(nb::object x, plan& p, nb::object out, nb::object scale) {
  constexpr const char* where = "dispatch";
  const read_array from = array_of(where, "x", x);
  const moeroute_const_matrix rows = rows_of(where, "x", from);
  const optional_array s(where, "scale", scale);
  const float* const factors = s.list<float>(where, "scale", "float32", p.slots.counts().choices);
  const result_rows to(where, std::move(out), p.slots.slots(), rows.cols);
  {
    nb::gil_scoped_release others;
    mr::check(moeroute_dispatch(p.slots.get(), rows, to.rows, factors, nullptr));
  }
  return to.object;
}

nb::object combine(nb::object slots, plan& p, assignment& a, nb::object out, bool weights_applied,
                   bool accumulate, nb::object x, nb::object shared, nb::object shared_weight) {
  constexpr const char* where = "combine";
  const read_array from = array_of(where, "slots", slots);
  const moeroute_const_matrix rows = rows_of(where, "slots", from);
  const optional_array rest(where, "x", x), sh(where, "shared", shared),
      sw(where, "shared_weight", shared_weight);
  mr::combine_options options{};
  options.weights_applied = weights_applied;
  options.accumulate = accumulate;
  if (accumulate && out.is_none()) refuse("moeroute::combine: accumulate is given and out is not");
  if (rest.there) {
    options.lost_residual = 1;
    options.x = rows_of(where, "x", rest.array);
  }
  if (sh.there) options.shared = rows_of(where, "shared", sh.array);
  options.shared_weight = sw.list<float>(where, "shared_weight", "float32", a.choices.tokens());
  const result_rows to(where, std::move(out), a.choices.tokens(), rows.cols);
  {
    nb::gil_scoped_release others;
    const std::lock_guard alone(a.mutex);
    mr::check(moeroute_combine(rows, p.slots.get(), a.choices.get(), to.rows, &options, nullptr));
  }
  return to.object;
}

struct gate {
  mr::gate_weight weight;
  std::int64_t experts;
};

std::unique_ptr<gate> new_gate(nb::object weight, nb::object bias) {
  constexpr const char* where = "Gate";
  const read_array w = array_of(where, "weight", weight);
  const moeroute_const_matrix rows = rows_of(where, "weight", w);
  const optional_array b(where, "bias", bias);
  const float* const first = b.list<float>(where, "bias", "float32", rows.rows);
  mr::const_rows given;
  static_cast<moeroute_const_matrix&>(given) = rows;
  return std::unique_ptr<gate>(
      new gate{mr::gate_weight(given, first == nullptr
                                          ? std::span<const float>{}
                                          : std::span(first, static_cast<std::size_t>(rows.rows))),
               rows.rows});
}

nb::object gate_logits(const gate& g, nb::object x, nb::object out,
                       std::optional<float> cosine_scale) {
  constexpr const char* where = "Gate";
  const read_array from = array_of(where, "x", x);
  const moeroute_const_matrix rows = rows_of(where, "x", from);
  const result_rows to(where, std::move(out), rows.rows, g.experts);
  {
    nb::gil_scoped_release others;
    mr::check(cosine_scale
                  ? moeroute_gate_cosine(g.weight.get(), rows, *cosine_scale, to.rows, nullptr)
                  : moeroute_gate_run(g.weight.get(), rows, to.rows, nullptr));
  }
  return to.object;
}

struct soft_plan {
  mr::soft_plan made{};
};

std::unique_ptr<soft_plan> new_soft_plan(nb::object logits, std::int64_t slots_per_expert) {
  const read_array z = array_of("SoftPlan", "logits", logits);
  const moeroute_const_matrix rows = rows_of("SoftPlan", "logits", z);
  auto out = std::make_unique<soft_plan>();
  nb::gil_scoped_release others;
  mr::check(moeroute_soft_plan_make(out->made.get(), rows, slots_per_expert, nullptr));
  return out;
}

// ---- balance ------------------------------------------------------------------------------------

nb::object balance_loss(nb::object logits, assignment& a, double switch_coefficient,
                        double z_coefficient, double sequence_coefficient,
                        std::int64_t sequence_length, const std::string& scores, nb::object mask,
                        nb::object out) {
  constexpr const char* where = "balance_loss";
  const read_array z = array_of(where, "logits", logits);
  const moeroute_const_matrix rows = rows_of(where, "logits", z);
  const optional_array m(where, "mask", mask);
  mr::losses what{};
  what.switch_coefficient = switch_coefficient;
  what.z_coefficient = z_coefficient;
  what.sequence_coefficient = sequence_coefficient;
  what.sequence_length = sequence_length;
  what.scores = word(where, "scores", scores, {"softmax", "sigmoid", "sqrt_softplus"});
  what.mask = m.list<std::uint8_t>(where, "mask", "bool or uint8", rows.rows);
  const result_rows to(where, std::move(out), rows.rows, rows.cols);
  double values[3] = {};
  {
    nb::gil_scoped_release others;
    const std::lock_guard alone(a.mutex);
    mr::check(moeroute_balance_loss(&what, rows, a.choices.get(), to.rows, nullptr, values));
  }
  nb::dict named;
  named["switch"] = values[0];
  named["z"] = values[1];
  named["sequence"] = values[2];
  return nb::make_tuple(named, to.object);
}

nb::object load(assignment& a, bool first_only, bool kept_only, nb::object mask) {
  constexpr const char* where = "load";
  const optional_array m(where, "mask", mask);
  std::vector<double> counts;
  {
    nb::gil_scoped_release others;
    const std::lock_guard alone(a.mutex);
    counts.resize(static_cast<std::size_t>(a.choices.experts()));
    mr::check(moeroute_count_choices(
        a.choices.get(), first_only, kept_only,
        m.list<std::uint8_t>(where, "mask", "bool or uint8", a.choices.tokens()), counts.data(),
        std::ssize(counts)));
  }
  return list_array(counts.data(), std::ssize(counts));
}

nb::dict apply_capacity(assignment& a, const std::string& formula, double factor,
                        std::int64_t count, std::int64_t minimum, std::int64_t multiple,
                        const std::string& order, const std::string& renormalize, float eps,
                        nb::object priority, std::uint64_t seed, std::uint64_t step) {
  constexpr const char* where = "apply_capacity";
  mr::capacity policy{};
  policy.formula =
      word(where, "formula", formula,
           {"unlimited", "fixed", "megatron", "deepspeed", "megablocks", "vmoe_ceil", "vmoe_round",
            "tutel", "nllb_train", "nllb_eval", "stable_moe", "nucleus", "soft_moe"});
  policy.order = word(where, "order", order,
                      {"choice_major", "token_major", "by_weight", "batch_priority", "random"});
  policy.renormalize = word(where, "renormalize", renormalize, {"no", "before", "after"});
  policy.factor = factor;
  policy.count = count;
  policy.minimum = minimum;
  policy.multiple = multiple;
  policy.eps = eps;
  policy.seed = seed;
  policy.step = step;
  const optional_array p(where, "priority", priority);
  mr::capacity_result result{};
  {
    nb::gil_scoped_release others;
    const std::lock_guard alone(a.mutex);
    policy.priority = p.list<float>(where, "priority", "float32", a.choices.tokens());
    result = mr::apply_capacity(a.choices, policy);
  }
  nb::dict named;
  named["capacity"] = result.capacity;
  named["kept"] = result.kept;
  named["dropped"] = result.dropped;
  named["unrouted"] = result.unrouted;
  return named;
}

struct bias_controller {
  mr::bias made;
};

std::unique_ptr<bias_controller> new_bias(std::int64_t experts, const std::string& rule,
                                          const std::string& error, const std::string& decay,
                                          bool centre, float step, float least_factor) {
  constexpr const char* where = "BiasController";
  mr::bias_options options{};
  options.rule = word(where, "rule", rule, {"sign", "proportional", "multiplicative"});
  options.error = word(where, "error", error, {"over_mean", "over_total", "in_tokens"});
  options.decay = word(where, "decay", decay, {"none", "inverse_root", "inverse"});
  options.centre = centre;
  options.step = step;
  options.least_factor = least_factor;
  return std::unique_ptr<bias_controller>(new bias_controller{mr::bias(experts, options)});
}

const char* const route_text =
    "Which experts each token goes to, with which weights.\n\n"
    "logits: [T, columns] in float32, bfloat16 or float16 (uint16 is taken for bfloat16), rows of\n"
    "  contiguous elements; read where they are, without a copy.\n"
    "mask: [T] bool, False: the token takes no part. token_ids: [T] int32, for tables.\n"
    "k_of_token: [T] int32, each token's own k. seed, step: of everything random.\n"
    "out: an Assignment to write again, which spares allocations.\n\n"
    ">>> ids, weights = moeroute.Router('mixtral').route(logits)\n";

}  // namespace

NB_MODULE(_moeroute, m) {
  // What a script still holds when the interpreter ends is no leak.
  nb::set_leak_warnings(false);
  m.doc() = "Mixture-of-experts routing, bit-true to published models.";
  m.attr("__version__") = moeroute_version();

  m.def("isa", [] { return std::string(moeroute_isa()); }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> all;
        for (std::int32_t i = 0; const char* name = moeroute_isa_name(i); ++i)
          all.emplace_back(name);
        return all;
      },
      "The instruction sets that this machine can run, the fastest first.");
  m.def(
      "use_isa", [](const std::string& name) { mr::check(moeroute_use_isa(name.c_str())); },
      nb::arg("name"),
      "Uses another instruction set from here on; routers and gates keep the one they were made "
      "with.");
  m.def(
      "models",
      [] {
        std::vector<std::string> all;
        for (const auto& entry : moeroute::catalog) all.emplace_back(entry.name);
        for (const auto& entry : moeroute::newer_catalog) all.emplace_back(entry.name);
        return all;
      },
      "The names of the catalogue.");
  m.def(
      "describe",
      [](nb::object what, std::int64_t layer) { return moeroute::to_string(spec_of(what, layer)); },
      nb::arg("what").none(), nb::arg("layer") = 0,
      "A router as one line of words, E=8 k=2 ...: of a model's name, a line, or a config.json as "
      "a dict.");

  nb::class_<assignment>(
      m, "Assignment",
      "Which experts each token goes to, with which weights. Unpacks into ids and weights.")
      .def(
          "__init__",
          [](assignment* self, nb::object ids, nb::object weights, std::int64_t experts) {
            constexpr const char* where = "Assignment";
            const read_array i = array_of(where, "ids", ids),
                             w = array_of(where, "weights", weights);
            if (i.ndim() != 2)
              refuse("moeroute::Assignment: ids has " + std::to_string(i.ndim()) +
                     " axes, expected 2");
            const auto all = list_of<std::int32_t>(where, "ids", "int32", i);
            const auto of = list_of<float>(where, "weights", "float32", w, std::ssize(all));
            auto made = std::make_unique<mr::assignment>();
            made->set(all, of, experts, static_cast<std::int64_t>(i.shape(1)));
            new (self) assignment{std::move(*made)};
          },
          nb::arg("ids").none(), nb::arg("weights").none(), nb::arg("experts"),
          "Choices that somebody else made: ids [T, k] int32 and weights [T, k] float32, copied "
          "and checked.")
      .def_prop_ro("ids", &assignment::ids,
                   "int32 [T, k], -1: none; one list where k varies. A copy.")
      .def_prop_ro("weights", &assignment::weights, "float32, as ids. A copy.")
      .def_prop_ro(
          "offsets",
          [](const assignment& a) -> nb::object {
            std::vector<std::int32_t> copy;
            {
              nb::gil_scoped_release others;
              const std::lock_guard alone(a.mutex);
              copy.assign(a.choices.offsets().begin(), a.choices.offsets().end());
            }
            if (copy.empty()) return nb::none();
            return list_array(copy.data(), std::ssize(copy));
          },
          nb::sig("def offsets(self) -> object"), "[T + 1] where k varies, else None.")
      .def_prop_ro(
          "kept",
          [](const assignment& a) -> nb::object {
            if (a.choices.kept().empty()) return nb::none();
            return a.shaped([](const auto& c) { return c.kept(); });
          },
          nb::sig("def kept(self) -> object"),
          "uint8, 0: capacity dropped the choice; None where nothing was.")
      .def_prop_ro("tokens", [](const assignment& a) { return a.choices.tokens(); })
      .def_prop_ro("experts", [](const assignment& a) { return a.choices.experts(); })
      .def_prop_ro("k", [](const assignment& a) { return a.choices.k(); })
      .def("__iter__",
           [](const assignment& a) { return nb::iter(nb::make_tuple(a.ids(), a.weights())); })
      .def("load", &load, nb::kw_only(), nb::arg("first_only") = false,
           nb::arg("kept_only") = false, nb::arg("mask") = nb::none(),
           "float64 [E]: choices of every expert. first_only: each token's best alone; kept_only: "
           "without "
           "those dropped.")
      .def("apply_capacity", &apply_capacity, nb::kw_only(), nb::arg("formula") = "fixed",
           nb::arg("factor") = 1.0, nb::arg("count") = 0, nb::arg("minimum") = 0,
           nb::arg("multiple") = 1, nb::arg("order") = "choice_major",
           nb::arg("renormalize") = "no", nb::arg("eps") = 0.0f, nb::arg("priority") = nb::none(),
           nb::arg("seed") = 0, nb::arg("step") = 0,
           "Drops every choice that finds its expert full: weight 0, the id stays. Returns "
           "capacity, kept, "
           "dropped and unrouted.");

  nb::class_<router>(m, "Router",
                     "A router: of a model's name, a line of words, or a config.json as a dict.\n\n"
                     ">>> moeroute.Router('deepseek_v3', bias=correction)\n"
                     ">>> moeroute.Router('E=64 k=6 normalize=sum')\n")
      .def(nb::new_(&new_router), nb::arg("what").none(), nb::kw_only(),
           nb::arg("bias") = nb::none(), nb::arg("per_expert_scale") = nb::none(),
           nb::arg("gamma") = nb::none(), nb::arg("table") = nb::none(), nb::arg("layer") = 0,
           "bias, per_expert_scale, gamma: [E] float32, referred to: they may be written between "
           "calls.\n"
           "table: [vocabulary, k] int32 experts by token id. layer: of a config, whose layers may "
           "differ.")
      .def("route", &route, nb::arg("logits").none(), nb::kw_only(), nb::arg("mask") = nb::none(),
           nb::arg("token_ids") = nb::none(), nb::arg("k_of_token") = nb::none(),
           nb::arg("seed") = 0, nb::arg("step") = 0, nb::arg("out") = nb::none(),
           nb::sig("def route(self, logits: object, *, mask: object | None = None, token_ids: "
                   "object | None = "
                   "None, k_of_token: object | None = None, seed: int = 0, step: int = 0, out: "
                   "Assignment | None "
                   "= None) -> Assignment"),
           route_text)
      .def_prop_ro("experts", [](const router& r) { return r.made->experts(); })
      .def_prop_ro("k", [](const router& r) { return r.made->k(); })
      .def_prop_ro(
          "columns", [](const router& r) { return r.made->columns(); }, "Of the logits.")
      .def_prop_ro(
          "ragged", [](const router& r) { return r.made->ragged(); },
          "Whether the number of choices varies from token to token.")
      .def_prop_ro(
          "routed_scale", [](const router& r) { return r.spec.routed_scale(); },
          "What the combined row is to be multiplied by.")
      .def_prop_ro("_handle",
                   [](const router& r) {
                     return nb::capsule(static_cast<const void*>(r.made->get()), "moeroute_router");
                   })
      .def_prop_ro("spec", [](const router& r) { return moeroute::to_string(r.spec); })
      .def("__repr__",
           [](const router& r) { return "Router('" + moeroute::to_string(r.spec) + "')"; });

  nb::class_<plan>(m, "Plan", "Slots in expert-major order, and the way back.")
      .def(nb::new_(&new_plan), nb::arg("assignment"), nb::kw_only(), nb::arg("block") = 1,
           nb::arg("capacity") = 0, nb::arg("spare_tokens") = false, nb::arg("owned") = nb::none(),
           nb::arg("mask") = nb::none(),
           "block: an expert's slots are rounded up to a multiple. capacity: every expert gets "
           "exactly so many.\n"
           "owned: [E] bool, False: left to others. mask: [T] bool.")
      .def_prop_ro("slots", [](const plan& p) { return p.slots.slots(); })
      .def_prop_ro("experts", [](const plan& p) { return p.slots.counts().experts; })
      .def_prop_ro("kept", [](const plan& p) { return p.slots.counts().kept; })
      .def_prop_ro("dropped", [](const plan& p) { return p.slots.counts().dropped; })
      .def_prop_ro("unrouted", [](const plan& p) { return p.slots.counts().unrouted; })
      .def_prop_ro(
          "offsets",
          [](const plan& p) {
            return list_array(p.slots.offsets().data(), std::ssize(p.slots.offsets()));
          },
          "int32 [E + 1]: expert e owns the slots from offsets[e] to offsets[e + 1].")
      .def_prop_ro(
          "loads",
          [](const plan& p) {
            return list_array(p.slots.loads().data(), std::ssize(p.slots.loads()));
          },
          "int32 [E]: the first loads[e] slots of expert e are tokens, the rest padding.")
      .def_prop_ro(
          "token_of_slot",
          [](const plan& p) {
            return list_array(p.slots.token_of_slot().data(), std::ssize(p.slots.token_of_slot()));
          },
          "int32 [slots], -1: empty.")
      .def_prop_ro(
          "slot_of_choice",
          [](const plan& p) {
            return list_array(p.slots.slot_of_choice().data(),
                              std::ssize(p.slots.slot_of_choice()));
          },
          "int32 [choices], -1: none.")
      .def(
          "aligned_blocks",
          [](const plan& p, std::int64_t block, std::int32_t tail_expert) {
            if (block < 1)
              refuse("moeroute::aligned_blocks: block is " + std::to_string(block) +
                     ", expected at least 1");
            const std::int64_t slots = p.slots.slots(), blocks = (slots + block - 1) / block;
            std::vector<std::int32_t> sorted(static_cast<std::size_t>(slots)),
                experts(static_cast<std::size_t>(blocks));
            mr::check(moeroute_plan_aligned_blocks(p.slots.get(), block, tail_expert, sorted.data(),
                                                   slots, experts.data(), nullptr, blocks));
            return nb::make_tuple(list_array(sorted.data(), slots),
                                  list_array(experts.data(), blocks));
          },
          nb::arg("block"), nb::arg("tail_expert") = -1,
          "The arrays of moe_align_block_size: choices in slot order, the expert of every block.");

  m.def(
      "dispatch", &dispatch, nb::arg("x").none(), nb::arg("plan"), nb::kw_only(),
      nb::arg("out") = nb::none(), nb::arg("scale") = nb::none(),
      "One contiguous block of rows per expert: [slots, d] of x [T, d]; new float32 rows, or out.\n"
      "scale: [choices] float32 that rows are multiplied with.");
  m.def(
      "combine", &combine, nb::arg("slots").none(), nb::arg("plan"), nb::arg("assignment"),
      nb::kw_only(), nb::arg("out") = nb::none(), nb::arg("weights_applied") = false,
      nb::arg("accumulate") = false, nb::arg("x") = nb::none(), nb::arg("shared") = nb::none(),
      nb::arg("shared_weight") = nb::none(),
      "The weighted sum of every token's rows, [T, d]; sums in float in rank order, rounded once.\n"
      "x: rows for tokens that lost all choices. shared: rows added last, times shared_weight "
      "[T].");

  nb::class_<gate>(m, "Gate", "Gate weights [E, d], packed once; calling it gives logits [T, E].")
      .def(nb::new_(&new_gate), nb::arg("weight").none(), nb::arg("bias") = nb::none())
      .def(
          "__call__",
          [](const gate& g, nb::object x, nb::object out) { return gate_logits(g, x, out, {}); },
          nb::arg("x").none(), nb::kw_only(), nb::arg("out") = nb::none(),
          "logits = x W^T + b, in float32.")
      .def(
          "cosine",
          [](const gate& g, nb::object x, float scale, nb::object out) {
            return gate_logits(g, x, out, scale);
          },
          nb::arg("x").none(), nb::arg("scale"), nb::kw_only(), nb::arg("out") = nb::none(),
          "logits = scale * cos(x, w_e), for weights whose rows have norm 1.");

  nb::class_<soft_plan>(m, "SoftPlan",
                        "A soft mixture: every token in every slot, every slot in every token.")
      .def(nb::new_(&new_soft_plan), nb::arg("logits").none(), nb::arg("slots_per_expert") = 1)
      .def_prop_ro(
          "dispatch_weights",
          [](const soft_plan& p) {
            const auto v = p.made.view();
            return matrix_array(v.dispatch, v.slots, v.tokens);
          },
          "[slots, T], rows sum to 1.")
      .def_prop_ro(
          "combine_weights",
          [](const soft_plan& p) {
            const auto v = p.made.view();
            return matrix_array(v.combine, v.tokens, v.slots);
          },
          "[T, slots], rows sum to 1.")
      .def(
          "dispatch",
          [](const soft_plan& p, nb::object x, nb::object out) {
            const read_array from = array_of("SoftPlan.dispatch", "x", x);
            const moeroute_const_matrix rows = rows_of("SoftPlan.dispatch", "x", from);
            const result_rows to("SoftPlan.dispatch", std::move(out), p.made.view().slots,
                                 rows.cols);
            mr::check(moeroute_soft_dispatch(p.made.get(), rows, to.rows, nullptr));
            return to.object;
          },
          nb::arg("x").none(), nb::kw_only(), nb::arg("out") = nb::none(),
          "[slots, d] of x [T, d].")
      .def(
          "combine",
          [](const soft_plan& p, nb::object slots, nb::object out) {
            const read_array from = array_of("SoftPlan.combine", "slots", slots);
            const moeroute_const_matrix rows = rows_of("SoftPlan.combine", "slots", from);
            const result_rows to("SoftPlan.combine", std::move(out), p.made.view().tokens,
                                 rows.cols);
            mr::check(moeroute_soft_combine(p.made.get(), rows, to.rows, nullptr));
            return to.object;
          },
          nb::arg("slots").none(), nb::kw_only(), nb::arg("out") = nb::none(),
          "[T, d] of slots [slots, d].");

  m.def("balance_loss", &balance_loss, nb::arg("logits").none(), nb::arg("assignment"),
        nb::kw_only(), nb::arg("switch") = 0.0, nb::arg("z") = 0.0, nb::arg("sequence") = 0.0,
        nb::arg("sequence_length") = 0, nb::arg("scores") = "softmax", nb::arg("mask") = nb::none(),
        nb::arg("out") = nb::none(),
        "Losses of a layer by their coefficients, and the gradient of their sum: ({'switch': ..., "
        "'z': ...,\n"
        "'sequence': ...}, dlogits [T, E]). switch as Megatron-LM has it, z of ST-MoE, sequence of "
        "DeepSeek.");

  nb::class_<bias_controller>(
      m, "BiasController",
      "The bias of balancing without a loss: values feed Router(bias=...) and follow "
      "every update.")
      .def(nb::new_(&new_bias), nb::arg("experts"), nb::kw_only(), nb::arg("rule") = "sign",
           nb::arg("error") = "over_mean", nb::arg("decay") = "none", nb::arg("centre") = false,
           nb::arg("step") = 0.001f, nb::arg("least_factor") = 0.01f)
      .def(
          "update",
          [](bias_controller& b, nb::object counts) {
            const read_array c = array_of("BiasController.update", "counts", counts);
            b.made.update(list_of<double>("BiasController.update", "counts", "float64", c));
          },
          nb::arg("counts").none(),
          "counts: float64 [E] of one global batch, as Assignment.load() gives them.")
      .def_prop_ro(
          "values",
          [](nb::handle self) {
            const std::span<float> v = nb::cast<bias_controller&>(self).made.values();
            return nb::ndarray<nb::numpy, float>(v.data(), {v.size()}, self).cast();
          },
          "float32 [E]: the memory itself, which may be written (checkpoints).");

  bind_systems(m);
#if MOEROUTE_PYTHON_JAX
  bind_jax(m);
#endif
}
