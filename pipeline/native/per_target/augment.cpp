// The vector code of augment.cpp; compiled once for each target and linked with it.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../augment_recipe.h"

// Vectors are passed between functions that are all inlined, so how they are passed does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include "../target_begin.h"

#include "../augment_lanes.h"

#include "../target_end.h"
