// CPU version of group_norm_silu.h. The compiler vectorises its plain loops over the channels of a row.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "group_norm_silu.h"

// One library serves every x86-64: the dynamic loader picks the version with the widest instructions of the machine.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PER_MACHINE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PER_MACHINE
#endif
#define INLINE inline __attribute__((always_inline))

namespace alignprop_fast {
namespace {

struct BFloat16 {
  uint16_t bits;
};

INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
INLINE float load(const float& value) { return value; }
INLINE float load(const BFloat16& value) { return bits_to_float(uint32_t(value.bits) << 16); }
INLINE void store(float& to, float value) { to = value; }
INLINE void store(BFloat16& to, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to.bits = uint16_t(value == value ? rounded : 0x7fc0);
}

// exp by Cody-Waite reduction and a Taylor polynomial on |r| <= ln(2) / 2, within 2 units in the last place. std::exp
// would keep the loop scalar. The comparisons let NaN through.
INLINE float vector_exp(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are now the rounded integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23);
}
INLINE float sigmoid(float z) { return 1.0f / (1.0f + vector_exp(-z)); }

// Per channel: mean and squared deviations of ROWS rows, joined to those of the `seen` rows before them.
template <typename T, int ROWS>
INLINE void join_rows(const T* __restrict x, int64_t C, float seen, float* __restrict mean, float* __restrict squares) {
  const float share = float(ROWS) / (seen + float(ROWS));
  for (int64_t c = 0; c < C; ++c) {
    float value[ROWS], centre = 0, square = 0;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) centre += value[r] = load(x[r * C + c]);
    centre *= 1.0f / ROWS;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) square += (value[r] - centre) * (value[r] - centre);
    const float delta = centre - mean[c];
    mean[c] += delta * share;
    squares[c] += square + delta * delta * (seen * share);
  }
}

template <typename T>
INLINE void statistics(const GroupNormSiluParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, D = C / p.groups;
  std::vector<float> mean(C), squares(C);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.chunks, k = task % p.chunks;
    const int64_t from = first_row(p.rows, p.chunks, k), to = first_row(p.rows, p.chunks, k + 1);
    std::fill(mean.begin(), mean.end(), 0.0f);
    std::fill(squares.begin(), squares.end(), 0.0f);
    const T* x = static_cast<const T*>(p.x) + b * p.rows * C;
    int64_t row = from;
    for (; row + 8 <= to; row += 8) join_rows<T, 8>(x + row * C, C, float(row - from), mean.data(), squares.data());
    for (; row < to; ++row) join_rows<T, 1>(x + row * C, C, float(row - from), mean.data(), squares.data());
    if (p.t != nullptr)
      for (int64_t c = 0; c < C; ++c) mean[c] += load(static_cast<const T*>(p.t)[b * C + c]);
    for (int64_t group = 0; group < p.groups; ++group) {
      const float *m = &mean[group * D], *s = &squares[group * D];
      float centre = 0, deviation = 0;
      for (int64_t d = 0; d < D; ++d) centre += m[d];
      centre /= float(D);
      for (int64_t d = 0; d < D; ++d) deviation += s[d] + float(to - from) * (m[d] - centre) * (m[d] - centre);
      float* out = p.partial + ((b * p.groups + group) * p.chunks + k) * 2;
      out[0] = centre;
      out[1] = deviation;
    }
  }
}

// Per-channel numbers for the passes over one image: z = (x - centre) scale + shift,
// dx = scale dz - d1 - (x - centre) d2.
struct Channels {
  std::vector<float> centre, scale, shift, d1, d2;

  template <typename T>
  INLINE void fill(const GroupNormSiluParams& p, int64_t b, bool with_moments) {
    const int64_t C = p.channels, D = C / p.groups;
    for (auto* values : {&centre, &scale, &shift, &d1, &d2}) values->resize(C);
    for (int64_t c = 0; c < C; ++c) {
      const int64_t i = b * p.groups + c / D;
      const float rstd = p.rstd[i];
      centre[c] = p.mean[i] - (p.t == nullptr ? 0.0f : load(static_cast<const T*>(p.t)[b * C + c]));
      scale[c] = rstd * load(static_cast<const T*>(p.gamma)[c]);
      shift[c] = load(static_cast<const T*>(p.beta)[c]);
      d1[c] = with_moments ? rstd * p.moments[2 * i] : 0.0f;
      d2[c] = with_moments ? rstd * rstd * p.moments[2 * i + 1] : 0.0f;
    }
  }
};

template <bool SILU>
INLINE float activation_gradient(float g, float z) {
  if (!SILU) return g;
  const float s = sigmoid(z);
  return g * s * (1.0f + z * (1.0f - s));
}

template <typename T, bool SILU>
INLINE void apply_rows(const T* __restrict x, T* __restrict y, int64_t n, int64_t C, const float* __restrict centre,
                       const float* __restrict scale, const float* __restrict shift) {
  for (int64_t r = 0; r < n; ++r, x += C, y += C)
    for (int64_t c = 0; c < C; ++c) {
      const float z = (load(x[c]) - centre[c]) * scale[c] + shift[c];
      store(y[c], SILU ? z * sigmoid(z) : z);
    }
}

template <typename T, bool SILU>
INLINE void reduce_rows(const T* __restrict g, const T* __restrict x, int64_t n, int64_t C,
                        const float* __restrict centre, const float* __restrict scale, const float* __restrict shift,
                        float* __restrict sum, float* __restrict sum_x) {
  for (int64_t r = 0; r < n; ++r, g += C, x += C)
    for (int64_t c = 0; c < C; ++c) {
      const float u = load(x[c]) - centre[c];
      const float dz = activation_gradient<SILU>(load(g[c]), u * scale[c] + shift[c]);
      sum[c] += dz;
      sum_x[c] += dz * u;
    }
}

template <typename T, bool SILU>
INLINE void gradient_rows(const T* __restrict g, const T* __restrict x, T* __restrict dx, int64_t n, int64_t C,
                          const float* __restrict centre, const float* __restrict scale,
                          const float* __restrict shift, const float* __restrict d1, const float* __restrict d2) {
  for (int64_t r = 0; r < n; ++r, g += C, x += C, dx += C)
    for (int64_t c = 0; c < C; ++c) {
      const float u = load(x[c]) - centre[c];
      const float dz = activation_gradient<SILU>(load(g[c]), u * scale[c] + shift[c]);
      store(dx[c], scale[c] * dz - d1[c] - u * d2[c]);
    }
}

enum class Pass { apply, reduce, gradient };

template <typename T, Pass PASS, bool SILU>
INLINE void run(const GroupNormSiluParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, D = C / p.groups;
  Channels f;
  std::vector<float> sum, sum_x;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.chunks, k = task % p.chunks;
    if (task == begin || k == 0) f.fill<T>(p, b, PASS == Pass::gradient);
    const int64_t from = first_row(p.rows, p.chunks, k), n = first_row(p.rows, p.chunks, k + 1) - from;
    const int64_t offset = (b * p.rows + from) * C;
    const T *x = static_cast<const T*>(p.x) + offset, *g = static_cast<const T*>(p.g) + offset;
    T* out = static_cast<T*>(p.out) + offset;
    if (PASS == Pass::apply) {
      apply_rows<T, SILU>(x, out, n, C, f.centre.data(), f.scale.data(), f.shift.data());
    } else if (PASS == Pass::gradient) {
      gradient_rows<T, SILU>(g, x, out, n, C, f.centre.data(), f.scale.data(), f.shift.data(), f.d1.data(),
                             f.d2.data());
    } else {
      sum.assign(C, 0.0f);
      sum_x.assign(C, 0.0f);
      reduce_rows<T, SILU>(g, x, n, C, f.centre.data(), f.scale.data(), f.shift.data(), sum.data(), sum_x.data());
      for (int64_t group = 0; group < p.groups; ++group) {
        float first = 0, second = 0;
        for (int64_t c = group * D; c < (group + 1) * D; ++c) {
          const float gamma = load(static_cast<const T*>(p.gamma)[c]);
          first += gamma * sum[c];
          second += gamma * sum_x[c];
        }
        float* partial = p.partial + ((b * p.groups + group) * p.chunks + k) * 2;
        partial[0] = first;
        partial[1] = second * p.rstd[b * p.groups + group];
      }
    }
  }
}

}  // namespace

// Plain functions instead of templates, because the compiler makes versions per machine only of plain functions.
#define PASS_FUNCTIONS(NAME, T)                                                                         \
  PER_MACHINE void statistics_##NAME(const GroupNormSiluParams& p, int64_t begin, int64_t end) {        \
    statistics<T>(p, begin, end);                                                                       \
  }                                                                                                     \
  PER_MACHINE void apply_##NAME(const GroupNormSiluParams& p, int64_t begin, int64_t end) {             \
    p.silu ? run<T, Pass::apply, true>(p, begin, end) : run<T, Pass::apply, false>(p, begin, end);      \
  }                                                                                                     \
  PER_MACHINE void reduce_##NAME(const GroupNormSiluParams& p, int64_t begin, int64_t end) {            \
    p.silu ? run<T, Pass::reduce, true>(p, begin, end) : run<T, Pass::reduce, false>(p, begin, end);    \
  }                                                                                                     \
  PER_MACHINE void gradient_##NAME(const GroupNormSiluParams& p, int64_t begin, int64_t end) {          \
    p.silu ? run<T, Pass::gradient, true>(p, begin, end) : run<T, Pass::gradient, false>(p, begin, end); \
  }
PASS_FUNCTIONS(float32, float)
PASS_FUNCTIONS(bfloat16, BFloat16)

void cpu_statistics(const GroupNormSiluParams& p, int64_t begin, int64_t end) {
  (p.dtype == DType::float32 ? statistics_float32 : statistics_bfloat16)(p, begin, end);
}
void cpu_apply(const GroupNormSiluParams& p, int64_t begin, int64_t end) {
  (p.dtype == DType::float32 ? apply_float32 : apply_bfloat16)(p, begin, end);
}
void cpu_reduce(const GroupNormSiluParams& p, int64_t begin, int64_t end) {
  (p.dtype == DType::float32 ? reduce_float32 : reduce_bfloat16)(p, begin, end);
}
void cpu_input_gradient(const GroupNormSiluParams& p, int64_t begin, int64_t end) {
  (p.dtype == DType::float32 ? gradient_float32 : gradient_bfloat16)(p, begin, end);
}

void cpu_join_statistics(const GroupNormSiluParams& p) {
  const int64_t D = p.channels / p.groups;
  for (int64_t i = 0; i < p.images * p.groups; ++i) {
    const float* partial = p.partial + i * p.chunks * 2;
    double seen = 0, mean = 0, squares = 0;
    for (int64_t k = 0; k < p.chunks; ++k) {
      const double n = double(D * (first_row(p.rows, p.chunks, k + 1) - first_row(p.rows, p.chunks, k)));
      const double delta = partial[2 * k] - mean;
      mean += delta * n / (seen + n);
      squares += partial[2 * k + 1] + delta * delta * seen * n / (seen + n);
      seen += n;
    }
    p.mean[i] = float(mean);
    p.rstd[i] = float(1.0 / std::sqrt(squares / seen + p.eps));
  }
}

void cpu_join_moments(const GroupNormSiluParams& p) {
  const double n = double(p.channels / p.groups * p.rows);
  for (int64_t i = 0; i < p.images * p.groups; ++i) {
    const float* partial = p.partial + i * p.chunks * 2;
    double first = 0, second = 0;
    for (int64_t k = 0; k < p.chunks; ++k) {
      first += partial[2 * k];
      second += partial[2 * k + 1];
    }
    p.moments[2 * i] = float(first / n);
    p.moments[2 * i + 1] = float(second / n);
  }
}

}  // namespace alignprop_fast
