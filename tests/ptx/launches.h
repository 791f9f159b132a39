// Launches of a kernel as `threaded.py` records them, read back and run.
//
// Included by `threads.h` and `fibers.h`, which say what a thread of a block is.
#pragma once

#include "../cuda_source.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using std::max;
using std::min;

struct Index {
    unsigned x, y, z;
};

enum { MOST_THREADS = 1024, RETURNED = -1 };
static float dynamic_shared[64 * 1024 / 4];

// --- a recorded launch, read back and run ---------------------------------------------------------------------------

struct Tensor {
    std::vector<int64_t> fields;  // where its address stands in the arguments
    char* memory;                 // of exactly its size, so that AddressSanitizer guards both ends
    std::vector<char> after;
};
struct Launch {
    void* kernel;
    std::vector<char> arguments;
    std::vector<Tensor> tensors;
    int64_t grid[3], block[3];
};
static Launch launch;

static int threads_of_a_block() { return launch.block[0] * launch.block[1] * launch.block[2]; }
static int blocks_of_the_launch() { return launch.grid[0] * launch.grid[1] * launch.grid[2]; }
static Index place(int number, const int64_t* size) {
    return {unsigned(number % size[0]), unsigned(number / size[0] % size[1]), unsigned(number / (size[0] * size[1]))};
}

static int64_t read_number(FILE* file) {
    int64_t value;
    if (fread(&value, sizeof value, 1, file) != 1) abort();
    return value;
}
static std::vector<char> read_bytes(FILE* file) {
    std::vector<char> bytes(read_number(file));
    if (fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) abort();
    return bytes;
}
static Tensor read_tensor(FILE* file) {
    Tensor tensor;
    for (int64_t i = read_number(file); i > 0; --i) tensor.fields.push_back(read_number(file));
    const std::vector<char> before = read_bytes(file);
    tensor.memory = (char*)malloc(before.size());
    std::copy(before.begin(), before.end(), tensor.memory);
    tensor.after = read_bytes(file);
    for (int64_t field : tensor.fields) memcpy(&launch.arguments[field], &tensor.memory, sizeof tensor.memory);
    return tensor;
}

// Runs every launch of a file by `run`; the number of tensors whose bytes are not those of the recording.
static int replay(const char* path, bool in_reverse, void* (*find)(const char*), void (*run)(bool)) {
    FILE* file = fopen(path, "rb");
    if (!file) abort();
    int different = 0;
    for (int64_t left = read_number(file); left > 0; --left) {
        launch = Launch();
        std::vector<char> name = read_bytes(file);
        name.push_back(0);
        launch.kernel = find(name.data());
        for (int64_t& size : launch.grid) size = read_number(file);
        for (int64_t& size : launch.block) size = read_number(file);
        launch.arguments = read_bytes(file);
        for (int64_t i = read_number(file); i > 0; --i) launch.tensors.push_back(read_tensor(file));
        run(in_reverse);
        for (Tensor& tensor : launch.tensors) {
            different += memcmp(tensor.memory, tensor.after.data(), tensor.after.size()) != 0;
            free(tensor.memory);
        }
    }
    fclose(file);
    return different;
}
