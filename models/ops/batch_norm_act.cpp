// The host side of batch_norm_act.cu without Python: allocations, launches and the node of the autograd graph.
//
// A ResNet-50 calls batch norm 53 times in each pass. Through Python a forward call costs the host about three times
// what PyTorch's own batch norm and ReLU do, and the GPU waits for it. This file does what BatchNormActKernels of
// batch_norm_act_kernels.py does, in the same order with the same arguments, so that the results have the same bits.
//
// Compiled against the headers of the installed PyTorch by host_library.py. It is linked with neither CUDA nor the
// driver: a plan brings the addresses of their functions.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "batch_norm_act.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A pass that depends on the gate has a kernel for each, in the order of their numbers.
enum Kernel {
    STATISTICS, JOIN_STATISTICS,
    NORMALISE, NORMALISE_ADDED, NORMALISE_RECOMPUTE, NORMALISE_RECOMPUTE_ADDED, NORMALISE_MASK_ADDED,
    BACKWARD_SUMS, BACKWARD_SUMS_RECOMPUTE, BACKWARD_SUMS_MASK, JOIN_SUMS,
    BACKWARD_INPUT, BACKWARD_INPUT_RECOMPUTE, BACKWARD_INPUT_MASK, BACKWARD_INPUT_MASK_ADDED,
    KERNELS
};
const char* const NAMES[KERNELS] = {
    "batch_norm_statistics", "batch_norm_join_statistics",
    "batch_norm_normalise", "batch_norm_normalise_added", "batch_norm_normalise_recompute",
    "batch_norm_normalise_recompute_added", "batch_norm_normalise_mask_added",
    "batch_norm_backward_sums", "batch_norm_backward_sums_recompute", "batch_norm_backward_sums_mask",
    "batch_norm_join_sums",
    "batch_norm_backward_input", "batch_norm_backward_input_recompute", "batch_norm_backward_input_mask",
    "batch_norm_backward_input_mask_added"};

Kernel by_gate(Kernel first, int gate) { return static_cast<Kernel>(first + gate); }

Kernel normalising(int gate, bool added) {
    // Only a sum with a residual keeps a mask.
    if (gate == GATE_MASK) return NORMALISE_MASK_ADDED;
    return added ? by_gate(NORMALISE_ADDED, 2 * gate) : by_gate(NORMALISE, 2 * gate);
}

}  // namespace

// The launches for maps of one shape; filled in by batch_norm_act_host.py, which keeps it alive for good.
struct Plan {
    int (*launch)(
        void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
        unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void** extra);
    int (*current_context)(void** context);
    int (*push_context)(void* context);
    int (*pop_context)(void** context);
    int (*current_stream)(int device, void** stream);
    void* context;  // in which the kernels were loaded
    void* kernels[KERNELS];
    long long rows;  // in a group
    int device, channels, groups, splits, columns, lanes, slices, pack;
};

extern "C" __attribute__((visibility("default"))) int batch_norm_act_plan_bytes() { return sizeof(Plan); }

namespace {

// The context of the kernels is current while this lives. A thread whose first CUDA work is a launch (autograd's, a
// loader's) has none, and one that works on another GPU has another.
class Bound {
   public:
    explicit Bound(const Plan& plan) : plan_(plan) {
        void* current = nullptr;
        if (plan.current_context(&current) == 0 && current == plan.context) return;
        TORCH_CHECK(plan.push_context(plan.context) == 0, "batch_norm_act: the driver refuses the kernels' context");
        pushed_ = true;
    }
    ~Bound() {
        void* popped;
        if (pushed_) plan_.pop_context(&popped);
    }
    Bound(const Bound&) = delete;

   private:
    const Plan& plan_;
    bool pushed_ = false;
};

// Launches on the stream that is current for the plan's device. In a backward pass that is the forward pass's.
class Stream {
   public:
    explicit Stream(const Plan& plan) : plan_(plan), bound_(plan) {
        TORCH_CHECK(plan.current_stream(plan.device, &stream_) == 0, "batch_norm_act: there is no current stream");
    }
    void over_rows(Kernel kernel, Arguments& arguments) {
        launch(kernel, plan_.columns, plan_.splits, plan_.groups, plan_.lanes, plan_.slices, arguments);
    }
    void joining(Kernel kernel, int groups, Arguments& arguments) {
        const unsigned blocks = (plan_.channels + JOIN_LANES - 1) / JOIN_LANES;
        launch(kernel, blocks, groups, 1, JOIN_LANES, JOIN_SLICES, arguments);
    }

   private:
    void launch(Kernel kernel, unsigned x, unsigned y, unsigned z, unsigned lanes, unsigned slices, Arguments& given) {
        void* pointers[] = {&given};  // the driver copies the structure in the call
        const int status =
            plan_.launch(plan_.kernels[kernel], x, y, z, lanes, slices, 1, 0, stream_, pointers, nullptr);
        TORCH_CHECK(
            status == 0, "batch_norm_act.cu, launch of ", NAMES[kernel], ", grid (", x, ", ", y, ", ", z,
            "), block (", lanes, ", ", slices, ", 1): the driver says ", status);
    }

    const Plan& plan_;
    Bound bound_;
    void* stream_ = nullptr;
};

void* address(const Tensor& tensor) { return tensor.defined() && tensor.numel() ? tensor.data_ptr() : nullptr; }

void* address(const Optional& tensor) { return tensor ? address(*tensor) : nullptr; }

// The layout and alignment that the kernels read; a copy where the map is not stored so.
Tensor readable(const Tensor& map) {
    Tensor last = map.contiguous(at::MemoryFormat::ChannelsLast);
    const bool aligned = reinterpret_cast<uintptr_t>(last.data_ptr()) % 16 == 0;
    return aligned ? last : last.clone(at::MemoryFormat::ChannelsLast);
}

// `result` in the layout of `pattern`: channels-last where the pattern is stored so and not in both layouts.
Tensor like_layout(const Tensor& result, const Tensor& pattern) {
    const bool last = pattern.is_contiguous(at::MemoryFormat::ChannelsLast) && !pattern.is_contiguous();
    return result.contiguous(last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

Arguments sizes_of(const Plan& plan) {
    Arguments a{};
    a.rows = plan.rows, a.channels = plan.channels, a.groups = plan.groups, a.splits = plan.splits;
    return a;
}

Tensor floats(const Plan& plan, at::IntArrayRef shape, const Tensor& like) {
    return at::empty(shape, like.options().dtype(at::kFloat));
}

struct Normalised {
    Tensor y, mean, variance, mask;
};

Normalised normalise(
    const Plan& plan, const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias,
    double eps, bool relu, bool keep_mask) {
    const Tensor map = readable(x), added = residual ? readable(*residual) : Tensor();
    const bool masked = keep_mask && relu && residual;
    const int gate = masked ? GATE_MASK : relu ? GATE_RECOMPUTE : GATE_NONE;
    Normalised made{at::empty_like(map), floats(plan, {plan.groups, plan.channels}, map)};
    made.variance = at::empty_like(made.mean);
    if (masked) made.mask = at::empty({map.numel() / plan.pack}, map.options().dtype(at::kByte));
    const Tensor partial = floats(plan, {2LL * plan.groups * plan.splits * plan.channels}, map);
    Arguments a = sizes_of(plan);
    a.x = address(map), a.residual = address(added), a.out = address(made.y);
    a.weight = static_cast<float*>(address(weight)), a.bias = static_cast<float*>(address(bias));
    a.mask = static_cast<unsigned char*>(address(made.mask));
    a.partial = static_cast<float*>(address(partial));
    a.mean = static_cast<float*>(address(made.mean)), a.variance = static_cast<float*>(address(made.variance));
    a.eps = eps;
    Stream stream(plan);
    stream.over_rows(STATISTICS, a);
    stream.joining(JOIN_STATISTICS, plan.groups, a);
    stream.over_rows(normalising(gate, residual.has_value()), a);
    made.y = like_layout(made.y, x);
    return made;
}

struct Gradients {
    Tensor x, residual, weight, bias;
};

Gradients differentiate(
    const Plan& plan, const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& variance, const Tensor& mask, double eps, bool relu, bool wants_residual) {
    const Tensor map = readable(x), from = readable(grad);
    const int gate = !relu ? GATE_NONE : mask.defined() ? GATE_MASK : GATE_RECOMPUTE;
    // A residual behind a ReLU had a mask kept.
    TORCH_INTERNAL_ASSERT(!wants_residual || gate == GATE_MASK);
    Gradients made{at::empty_like(map)};
    if (wants_residual) made.residual = at::empty_like(map);
    made.weight = floats(plan, {plan.channels}, map);
    made.bias = at::empty_like(made.weight);
    // One allocation for what only the launches see.
    const long long values = 2LL * plan.groups * plan.channels;
    const Tensor room = floats(plan, {values * (plan.splits + 1)}, map);
    Arguments a = sizes_of(plan);
    a.x = address(map), a.grad = address(from), a.out = address(made.x);
    a.weight = static_cast<float*>(address(weight)), a.bias = static_cast<float*>(address(bias));
    a.grad_residual = address(made.residual);
    a.mask = static_cast<unsigned char*>(address(mask));
    a.partial = static_cast<float*>(address(room)), a.sums = a.partial + values * plan.splits;
    a.mean = static_cast<float*>(address(mean)), a.variance = static_cast<float*>(address(variance));
    a.grad_weight = static_cast<float*>(address(made.weight));
    a.grad_bias = static_cast<float*>(address(made.bias));
    a.eps = eps;
    Stream stream(plan);
    stream.over_rows(by_gate(BACKWARD_SUMS, gate), a);
    stream.joining(JOIN_SUMS, 1, a);
    stream.over_rows(wants_residual ? BACKWARD_INPUT_MASK_ADDED : by_gate(BACKWARD_INPUT, gate), a);
    made.x = like_layout(made.x, x);
    if (wants_residual) made.residual = like_layout(made.residual, x);
    return made;
}

const Plan& plan_at(int64_t number) { return *reinterpret_cast<const Plan*>(number); }

// PyTorch names the node of the graph after this class.
struct BatchNormAct : torch::autograd::Function<BatchNormAct> {
    static variable_list forward(
        AutogradContext* context, const Tensor& x, const Optional& residual, const Optional& weight,
        const Optional& bias, int64_t plan, double eps, bool relu) {
        at::AutoDispatchBelowADInplaceOrView below;  // the node stands for all that happens in here
        // The statistics have no gradient, which would otherwise be zeros allocated in each backward pass.
        context->set_materialize_grads(false);
        Normalised made = normalise(plan_at(plan), x, residual, weight, bias, eps, relu, true);
        context->save_for_backward(
            {x, weight.value_or(Tensor()), bias.value_or(Tensor()), made.mean, made.variance, made.mask});
        context->saved_data["plan"] = plan;
        context->saved_data["eps"] = eps;
        context->saved_data["relu"] = relu;
        context->saved_data["residual"] = residual.has_value();
        context->mark_non_differentiable({made.mean, made.variance});
        return {made.y, made.mean, made.variance};
    }

    static variable_list backward(AutogradContext* context, variable_list grads) {
        variable_list results(7);
        // Nothing that depends on y was used.
        if (!grads[0].defined()) return results;
        TORCH_CHECK(!at::GradMode::is_enabled(), "batch_norm_act has no second derivative: leave create_graph out");
        const variable_list saved = context->get_saved_variables();
        const bool relu = context->saved_data["relu"].toBool();
        const auto given = wanted(context, saved);
        const Gradients made = differentiate(
            plan_at(context->saved_data["plan"].toInt()), grads[0], saved[0], saved[1], saved[2], saved[3], saved[4],
            saved[5], context->saved_data["eps"].toDouble(), relu, given[1] && relu);
        // Without a ReLU the residual's gradient is that of y itself.
        const Tensor all[] = {made.x, relu ? made.residual : grads[0], made.weight, made.bias};
        for (int each = 0; each < 4; ++each)
            if (given[each]) results[each] = all[each];
        return results;
    }

   private:
    // Whether x, residual, weight and bias want a gradient. The context numbers those that were given.
    static std::array<bool, 4> wanted(AutogradContext* context, const variable_list& saved) {
        const bool has[] = {true, context->saved_data["residual"].toBool(), saved[1].defined(), saved[2].defined()};
        std::array<bool, 4> wants{};
        size_t edge = 0;
        for (int each = 0; each < 4; ++each) wants[each] = has[each] && context->needs_input_grad(edge++);
        return wants;
    }
};

bool requires_grad(const Optional& tensor) { return tensor && tensor->requires_grad(); }

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(
    const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias, int64_t plan, double eps,
    bool relu) {
    const bool any = x.requires_grad() || requires_grad(residual) || requires_grad(weight) || requires_grad(bias);
    if (any && at::GradMode::is_enabled()) {
        const variable_list made = BatchNormAct::apply(x, residual, weight, bias, plan, eps, relu);
        return {made[0], made[1], made[2]};
    }
    at::AutoDispatchBelowADInplaceOrView below;
    // No backward pass will ask for a mask.
    const Normalised made = normalise(plan_at(plan), x, residual, weight, bias, eps, relu, false);
    return {made.y, made.mean, made.variance};
}

}  // namespace

TORCH_LIBRARY(regatta_host, library) {
    library.def(
        "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, int plan, float eps, bool relu)"
        " -> (Tensor, Tensor, Tensor)",
        &batch_norm_act);
}
