// The arithmetics that products run in, for kernels that are there once for each.
#pragma once

#include "matmul.cuh"

// A kernel is compiled for the chips that run it: those with tensor cores for its type, or those
// without. Elsewhere it is empty and never launched (see choose_math).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FUSED_MLP_ON_NEW(...) __VA_ARGS__
#define FUSED_MLP_ON_OLD(...)
#else
#define FUSED_MLP_ON_NEW(...)
#define FUSED_MLP_ON_OLD(...) __VA_ARGS__
#endif
#define FUSED_MLP_ON_ALL(...) __VA_ARGS__

// KERNELS(suffix of their names, chips, arithmetic) for each.
#define FUSED_MLP_EACH_ARITHMETIC(KERNELS)                                        \
  KERNELS(f32, FUSED_MLP_ON_ALL, fused_mlp::cuda::Fma<float, float>)              \
  KERNELS(f64, FUSED_MLP_ON_ALL, fused_mlp::cuda::Fma<double, double>)            \
  KERNELS(tf32, FUSED_MLP_ON_NEW, fused_mlp::cuda::Tf32)                          \
  KERNELS(bf16, FUSED_MLP_ON_NEW, fused_mlp::cuda::Mma16<__nv_bfloat16>)          \
  KERNELS(f16, FUSED_MLP_ON_NEW, fused_mlp::cuda::Mma16<__half>)                  \
  KERNELS(bf16_fma, FUSED_MLP_ON_OLD, fused_mlp::cuda::Fma<__nv_bfloat16, float>) \
  KERNELS(f16_fma, FUSED_MLP_ON_OLD, fused_mlp::cuda::Fma<__half, float>)
