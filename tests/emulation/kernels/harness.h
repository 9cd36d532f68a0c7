// How Python calls the kernels of the emulator's tests.
#pragma once

#include <exception>
#include <string>

#include "cuda/launch.h"

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

// Runs `body`; null, or what it threw, valid until the next call.
template <class Body>
const char* outcome(const Body& body) {
    static std::string message;
    try {
        const cudaError_t error = body();
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

// A dense tensor of `count` elements.
template <class T>
cvfast::cuda::Extent span(T* data, int64_t count) {
    return {data, !std::is_const_v<T>, 1, sizeof(T), {count}, {1}};
}
