/* Tiles: of 16 registers at most 12 for sums, the rest for operands. */
#if defined(__x86_64__)
#include "avx2.h"

#define NAME(part) mp_##part##_f32_avx2
#define VECTORS(m) ((m) <= 3 ? 4 : 2)
#define X_TYPE float
#define X_WIDEN(value) (value)
#define W_SIZE 4
#define LOAD_W vf_load
#define LOAD_W_TAIL vf_load_tail
#include "transposed_impl.h"

#define NAME(part) mp_##part##_bf16_avx2
#define VECTORS(m) ((m) <= 3 ? 4 : 2)
#define X_TYPE uint16_t
#define X_WIDEN(value) mp_f32_from_bf16(value)
#define W_SIZE 2
#define LOAD_W vf_load_bf16
#define LOAD_W_TAIL vf_load_bf16_tail
#include "transposed_impl.h"

#define NAME(part) mp_##part##_f16_avx2
#define VECTORS(m) ((m) <= 3 ? 4 : 2)
#define X_TYPE float
#define X_WIDEN(value) (value)
#define W_SIZE 2
#define LOAD_W vf_load_f16
#define LOAD_W_TAIL vf_load_f16_tail
#include "transposed_impl.h"
#endif
