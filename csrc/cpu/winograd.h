// The part of conv() that runs Winograd's algorithms; see conv.h.
#pragma once

#include "cpu/conv.h"

namespace cvfast {

ConvPlan winograd_plan(const ConvShape& shape, int threads);

// Task `task` of plan.pixel_blocks * plan.channel_blocks.
template <class T>
void winograd_task(const ConvShape& shape, const ConvPlan& plan, const ConvOperands<T>& operands,
                   int64_t task, void* scratch);

}  // namespace cvfast
