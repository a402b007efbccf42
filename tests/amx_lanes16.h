/* For csrc/x86/quantized_amxint8.c: vectors and tiles. */
#include "amx_emulation.h"
#include "lanes16.h"
