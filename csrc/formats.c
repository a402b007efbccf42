#include "formats.h"

const mp_format_info mp_formats[] = {
#define FORMAT(name, ...) {__VA_ARGS__},
#include "formats.def"
#undef FORMAT
};
const int mp_num_formats = sizeof mp_formats / sizeof *mp_formats;
