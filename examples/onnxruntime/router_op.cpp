// The operator Router of the domain "moeroute" for ONNX Runtime: a library that a session loads by
// register_custom_ops_library(). A graph's router becomes one node:
//
//   inputs      logits float [T, E]; bias float [E], a constant, where the model's router has one
//   attribute   model, the name of the router in the catalogue
//   outputs     ids int32 [T, k], best first; weights float [T, k]
#define ORT_API_MANUAL_INIT
#include <moeroute.h>
#include <onnxruntime_cxx_api.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

void check(int status) {
  if (status != MOEROUTE_OK) throw std::runtime_error(moeroute_last_error());
}

struct give_back {
  void operator()(moeroute_router* router) const { moeroute_router_free(router); }
  void operator()(moeroute_assignment* choices) const { moeroute_assignment_free(choices); }
};
using scratch = std::unique_ptr<moeroute_assignment, give_back>;

class router_kernel {
 public:
  explicit router_kernel(const OrtKernelInfo* raw) {
    const Ort::ConstKernelInfo info(raw);
    moeroute_spec spec;
    check(moeroute_spec_of_model(info.GetAttribute<std::string>("model").c_str(), &spec));
    moeroute_tensors tensors = {};
    // An input that is left out before others, or at the end, has an empty name.
    if (info.GetInputCount() > 1 && !info.GetInputName(1).empty()) {
      int constant = 0;
      const Ort::ConstValue bias = info.GetTensorConstantInput(1, &constant);
      if (constant == 0)
        throw std::invalid_argument("moeroute::Router: the bias is to be a constant of the graph");
      if (bias.GetTensorTypeAndShapeInfo().GetDimensionsCount() != 1)
        throw std::invalid_argument("moeroute::Router: the bias is to be [E]");
      const std::size_t size = bias.GetTensorTypeAndShapeInfo().GetElementCount();
      bias_.assign(bias.GetTensorData<float>(), bias.GetTensorData<float>() + size);
      tensors.bias = bias_.data();
      tensors.bias_size = static_cast<std::int64_t>(size);
    }
    moeroute_router* router = nullptr;
    check(moeroute_router_new(&spec, &tensors, &router));
    router_.reset(router);
    check(moeroute_router_get_shape(router, &shape_));
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    try {
      const Ort::KernelContext context(raw);
      const Ort::ConstValue logits = context.GetInput(0);
      const std::vector<std::int64_t> shape = logits.GetTensorTypeAndShapeInfo().GetShape();
      if (shape.size() != 2)
        throw std::invalid_argument("moeroute::Router: logits are to be [T, E]");
      const moeroute_const_matrix rows = {.data = logits.GetTensorData<float>(),
                                          .rows = shape[0],
                                          .cols = shape[1],
                                          .stride = 0,
                                          .type = MOEROUTE_FLOAT};
      const std::vector<std::int64_t> out = {shape[0], shape_.k};
      std::int32_t* ids = context.GetOutput(0, out).GetTensorMutableData<std::int32_t>();
      float* weights = context.GetOutput(1, out).GetTensorMutableData<float>();
      scratch choices = take();
      check(moeroute_route_to(router_.get(), rows, nullptr, nullptr, choices.get(), ids, weights));
      put(std::move(choices));
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::Status(error.what(), ORT_INVALID_ARGUMENT).release();
    }
  }

 private:
  // Runs of one session may overlap: each takes an assignment that nobody uses.
  scratch take() {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        scratch choices = std::move(free_.back());
        free_.pop_back();
        return choices;
      }
    }
    moeroute_assignment* choices = nullptr;
    check(moeroute_assignment_new(&choices));
    return scratch(choices);
  }
  void put(scratch choices) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(choices));
  }

  std::vector<float> bias_;
  std::unique_ptr<moeroute_router, give_back> router_;
  moeroute_router_shape shape_ = {};
  std::mutex mutex_;
  std::vector<scratch> free_;
};

struct router_op : Ort::CustomOpBase<router_op, router_kernel, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    try {
      *kernel = std::make_unique<router_kernel>(info).release();
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::Status(error.what(), ORT_INVALID_ARGUMENT).release();
    }
  }
  const char* GetName() const { return "Router"; }
  std::size_t GetInputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetInputType(std::size_t) const {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(std::size_t i) const {
    return i == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  std::size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(std::size_t i) const {
    return i == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
};

}  // namespace

extern "C" MOEROUTE_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                     const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr)
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "moeroute: this ONNX Runtime is too old");
  Ort::InitApi(api);
  try {
    static const router_op op;
    static Ort::CustomOpDomain domain("moeroute");
    static const bool added = (domain.Add(&op), true);
    (void)added;
    Ort::UnownedSessionOptions(options).Add(domain);
    return nullptr;
  } catch (const std::exception& error) {
    return Ort::Status(error.what(), ORT_FAIL).release();
  }
}
