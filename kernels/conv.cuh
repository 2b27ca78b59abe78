// The sizes of a convolution, whose patches and outputs these kernels lay out as [feature or channel, sample, position]: each of its
// products is then one matrix product for the whole batch.
#pragma once
#include "divide.cuh"

struct ConvSizes {
    u32 channels, features; // c, c kh kw
    u32 h, w, oh, ow;
    u32 kh, kw, sy, sx, py, px, dy, dx;
};
