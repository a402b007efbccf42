#ifndef MP_TILE_CONFIG_H
#define MP_TILE_CONFIG_H

#include <stdint.h>

/* What ldtilecfg reads. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;
_Static_assert(sizeof(tile_config) == 64, "the layout is the CPU's");

#endif
