#include "cpu/blas.h"

#include <cstdlib>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>

#include <cstring>

// Torch's libraries export BLAS by its Fortran names. Weak: a build of torch may lack them.
extern "C" {
#define FUSED_MLP_BLAS(name, T)                                                                    \
  __attribute__((weak, visibility("default"))) void name(                                          \
      const char* transpose_a, const char* transpose_b, const int* m, const int* n, const int* k,  \
      const T* alpha, const T* a, const int* lda, const T* b, const int* ldb, const T* beta, T* c, \
      const int* ldc)
FUSED_MLP_BLAS(sgemm_, float);
FUSED_MLP_BLAS(dgemm_, double);
#undef FUSED_MLP_BLAS
}

namespace fused_mlp {
namespace {

// Torch's BLAS is Intel's, which uses what Intel's processors have and on others keeps to AVX2,
// where ours wins. On a Xeon of 2023 with two threads it multiplies 2048 cubed at 275 to 296
// GFLOP/s, ours at 235, and its products of a training step take 0.75 of the time.
bool is_intel() {
  unsigned most = 0, name[3] = {};
  return __get_cpuid(0, &most, &name[0], &name[2], &name[1]) != 0 &&
         std::memcmp(name, "GenuineIntel", sizeof(name)) == 0;
}

bool choose() {
  if (sgemm_ == nullptr || dgemm_ == nullptr) return false;
  const char* wanted = std::getenv("FUSED_MLP_CPU_BLAS");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return false;
  if (wanted != nullptr && std::strcmp(wanted, "1") == 0) return true;
  return is_intel();
}

// BLAS is column-major: it sees every matrix transposed, and the product as b' @ a'.
template <class T, class Gemm>
void multiply(Gemm* gemm, int64_t rows, int64_t columns, int64_t depth, BlasMatrix<T> a,
              BlasMatrix<T> b, T* c, int64_t c_leading) {
  const int m = static_cast<int>(columns), n = static_cast<int>(rows);
  const int k = static_cast<int>(depth), ldc = static_cast<int>(c_leading);
  const int lda = static_cast<int>(b.leading), ldb = static_cast<int>(a.leading);
  const T alpha = 1, beta = 0;
  gemm(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &m, &n, &k, &alpha, b.data, &lda, a.data,
       &ldb, &beta, c, &ldc);
}

}  // namespace

bool blas_is_faster() {
  static const bool chosen = choose();
  return chosen;
}
void blas_multiply(int64_t rows, int64_t columns, int64_t depth, BlasMatrix<float> a,
                   BlasMatrix<float> b, float* c, int64_t c_leading) {
  multiply(sgemm_, rows, columns, depth, a, b, c, c_leading);
}
void blas_multiply(int64_t rows, int64_t columns, int64_t depth, BlasMatrix<double> a,
                   BlasMatrix<double> b, double* c, int64_t c_leading) {
  multiply(dgemm_, rows, columns, depth, a, b, c, c_leading);
}

}  // namespace fused_mlp

#else

namespace fused_mlp {

bool blas_is_faster() { return false; }
void blas_multiply(int64_t, int64_t, int64_t, BlasMatrix<float>, BlasMatrix<float>, float*,
                   int64_t) {
  std::abort();
}
void blas_multiply(int64_t, int64_t, int64_t, BlasMatrix<double>, BlasMatrix<double>, double*,
                   int64_t) {
  std::abort();
}

}  // namespace fused_mlp

#endif
