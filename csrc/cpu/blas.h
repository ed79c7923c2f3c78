// Matrix products by the BLAS that torch brings along, without a torch header (see parallel.h).
#pragma once

#include <cstdint>

namespace fused_mlp {

// Whether it multiplies large matrices of float32 and float64 faster than our kernels, and can be
// called. FUSED_MLP_CPU_BLAS=0|1 says so beforehand.
bool blas_is_faster();

// A row-major matrix, or its transpose: rows of `data` are `leading` elements apart.
template <class T>
struct BlasMatrix {
  const T* data;
  int64_t leading;
  bool transposed = false;
};

// c[rows, columns] = a[rows, depth] @ b[depth, columns]. Every size is positive and no size and no
// leading dimension exceeds an int. T is float or double.
template <class T>
void blas_multiply(int64_t rows, int64_t columns, int64_t depth, BlasMatrix<T> a, BlasMatrix<T> b,
                   T* c, int64_t c_leading);

}  // namespace fused_mlp
