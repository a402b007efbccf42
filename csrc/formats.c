#include "formats.h"

const mp_format_info mp_formats[] = {
#define FORMAT(name, ...) {__VA_ARGS__},
#include "formats.def"
#undef FORMAT
};
const int mp_num_formats = sizeof mp_formats / sizeof *mp_formats;

/* Hidden states of another type than the activations are widened to them. */
#define FORMAT(name, text, block, bytes, scale, act, hidden)                           \
    _Static_assert((act) == MP_ACT_f32 || (hidden) == MP_BFLOAT16,                     \
                   #name ": hidden states have to be, or to widen to, its activations");
#include "formats.def"
#undef FORMAT
