// What every kernel of batch_norm_act.cu takes by value, and what tells kernels of one pass apart. For device and host.

// What decides whether an element passes the ReLU in the backward pass: a part of a kernel's name, not an argument.
#define GATE_NONE 0       // there is no ReLU
#define GATE_RECOMPUTE 1  // the sign of the normalised value, worked out again from x
#define GATE_MASK 2       // a bit that the forward pass kept, since the residual is not at hand

#define THREADS 256  // of a block that walks over rows
#define JOIN_LANES 32
#define JOIN_SLICES 16

struct Arguments {
    const void* x;
    const void* residual;             // or null
    const void* grad;                 // of y
    const float* weight;              // (C) or null for 1
    const float* bias;                // (C) or null for 0
    void* out;                        // y, or the gradient of x
    void* grad_residual;              // or null
    unsigned char* mask;              // a byte a pack of VECTOR elements, or null
    float* partial;                   // two planes of (groups, splits, C)
    float* mean;                      // (groups, C)
    float* variance;                  // (groups, C), biased
    float* sums;                      // two planes of (groups, C)
    float* grad_weight;               // (C)
    float* grad_bias;                 // (C)
    float* running_mean;              // (C)
    float* running_variance;          // (C)
    long long* batches;               // number of batches seen
    long long rows;                   // in a group
    int channels, groups, splits, views;
    float eps, momentum;
};
