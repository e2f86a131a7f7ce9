// What the kernels use from outside their level. Every level's translation unit includes this
// before its target region: defined inside it, a shared inline function would be compiled for that
// level and could be the copy that the linker keeps for all.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/heuristics.h"
#include "common/params/append_kv.h"
#include "common/params/attention.h"
#include "common/params/flat_linear.h"
#include "common/types.h"
#include "common/visible.h"
#include "cpu/kernels/table.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
