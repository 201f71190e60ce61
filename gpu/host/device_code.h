// Everything a .cu file needs to be a C++ program in which each CUDA thread is a fiber.
//
// A module is built from one file that includes this header, then the .cu text inside an anonymous namespace, then one
// entry point per kernel (build.py writes it). Reading order: language, fiber, schedule, memory, barrier, warp, launch.
#pragma once
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <pthread.h>
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>
#include <unistd.h>
#include <utility>

#define NEOX_HOST 1

#include "sanitizers.h"
#include "language.h"
#include "half.h"
#include "fiber.h"
#include "schedule.h"
#include "undefined.h"
#include "memory.h"
#include "barrier.h"
#include "warp.h"
#include "atomics.h"
#include "arithmetic.h"
#include "async_copy.h"
#include "tensor_core.h"
#include "launch.h"
