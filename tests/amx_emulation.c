/* AMX in C, after the operations in Intel's Software Developer's Manual: LDTILECFG,
 * TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBF16PS, TDPBSSD, of palette 1.
 *
 * What raises an exception in the CPU is kept for the test to ask (amx_fault), and does
 * nothing else: the first fault counts. */
#include "amx_emulation.h"

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

typedef struct {
    int rows, row_bytes; /* both 0: not configured */
    unsigned char data[ROWS][ROW_BYTES];
} tile;

static _Thread_local struct {
    int configured;
    tile tiles[TILES];
    const char *fault;
    long products; /* TDPBF16PS and TDPBSSD so far */
} cpu;

/* The first fault since the last question, or NULL. */
const char *amx_fault(void)
{
    const char *fault = cpu.fault;
    cpu.fault = NULL;
    return fault;
}

int amx_is_configured(void)
{
    return cpu.configured;
}

long amx_products(void)
{
    return cpu.products;
}

static int refuse(int condition, const char *what)
{
    if (condition && !cpu.fault)
        cpu.fault = what;
    return condition;
}

static tile *of(int number)
{
    static tile nowhere;
    if (refuse(!cpu.configured, "#UD: the tiles are not configured")
        || refuse(number < 0 || number >= TILES || !cpu.tiles[number].rows,
                  "#UD: this tile is not configured"))
        return memset(&nowhere, 0, sizeof nowhere);
    return &cpu.tiles[number];
}

void amx_config(const void *config)
{
    unsigned char bytes[64];
    memcpy(bytes, config, sizeof bytes);
    int reserved = bytes[1]; /* start_row: only of an interrupted load */
    for (int i = 2; i < 16; i++)
        reserved |= bytes[i];
    for (int i = TILES; i < 16; i++)
        reserved |= bytes[16 + 2 * i] | bytes[17 + 2 * i] | bytes[48 + i];
    if (refuse(bytes[0] != 1, "#GP: palette is not 1")
        || refuse(reserved, "#GP: a reserved byte is not 0"))
        return;
    for (int i = 0; i < TILES; i++) {
        const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
        const int rows = bytes[48 + i];
        if (refuse(rows > ROWS || row_bytes > ROW_BYTES, "#GP: the tile is too large")
            || refuse(!rows != !row_bytes, "#GP: rows or bytes of a row are 0"))
            return;
    }
    memset(cpu.tiles, 0, sizeof cpu.tiles);
    for (int i = 0; i < TILES; i++) {
        cpu.tiles[i].row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
        cpu.tiles[i].rows = bytes[48 + i];
    }
    cpu.configured = 1;
}

void amx_release(void)
{
    cpu.configured = 0;
    memset(cpu.tiles, 0, sizeof cpu.tiles);
}

void amx_zero(int number)
{
    tile *t = of(number);
    memset(t->data, 0, sizeof t->data);
}

void amx_load(int number, const void *at, ptrdiff_t stride)
{
    tile *t = of(number);
    memset(t->data, 0, sizeof t->data);
    for (int r = 0; r < t->rows; r++)
        memcpy(t->data[r], (const char *)at + r * stride, (size_t)t->row_bytes);
}

void amx_store(int number, void *at, ptrdiff_t stride)
{
    const tile *t = of(number);
    for (int r = 0; r < t->rows; r++)
        memcpy((char *)at + r * stride, t->data[r], (size_t)t->row_bytes);
}

/* Subnormal numbers are 0, in operands and in results. */
static inline float flushed(float value)
{
    return fabsf(value) < FLT_MIN ? copysignf(0, value) : value;
}

static inline float bf16_at(const unsigned char *at)
{
    const uint32_t bits = (uint32_t)at[1] << 24 | (uint32_t)at[0] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return flushed(value);
}

/* Columns of c, as floats: c += the sums of the even products and of the odd ones, each
 * in the order of k. */
static void __attribute__((target("fma")))
multiply_row(float *c, int columns, const unsigned char *a, const tile *b)
{
    float sums[2][ROW_BYTES / 4] = {0};
    for (int k = 0; k < b->rows; k++)
        for (int odd = 0; odd < 2; odd++) {
            const float x = bf16_at(a + 4 * k + 2 * odd);
            for (int n = 0; n < columns; n++)
                sums[odd][n] = flushed(
                    fmaf(x, bf16_at(b->data[k] + 4 * n + 2 * odd), sums[odd][n]));
        }
    for (int n = 0; n < columns; n++)
        c[n] = flushed(flushed(c[n]) + flushed(sums[0][n] + sums[1][n]));
}

/* Columns of c, as int32: c += the products of the signed bytes. */
static void multiply_bytes(int32_t *c, int columns, const signed char *a, const tile *b)
{
    for (int k = 0; k < 4 * b->rows; k++)
        for (int n = 0; n < columns; n++)
            c[n] += a[k] * (signed char)b->data[k / 4][4 * n + k % 4];
}

/* Whether tiles can be multiplied. */
static int fit(const tile *c, const tile *a, const tile *b)
{
    return !refuse(c == a || a == b || b == c, "#UD: one tile twice")
        && !refuse(c->rows != a->rows || a->row_bytes / 4 != b->rows
                   || b->row_bytes != c->row_bytes, "#UD: the tiles do not fit")
        && !refuse(a->row_bytes % 4 || b->row_bytes % 4, "#UD: part of an element");
}

void amx_dpbf16(int c_number, int a_number, int b_number)
{
    tile *c = of(c_number), *a = of(a_number), *b = of(b_number);
    if (!fit(c, a, b))
        return;
    for (int r = 0; r < c->rows; r++) {
        float row[ROW_BYTES / 4];
        memcpy(row, c->data[r], sizeof row);
        multiply_row(row, c->row_bytes / 4, a->data[r], b);
        memcpy(c->data[r], row, sizeof row);
    }
    cpu.products++;
}

void amx_dpbssd(int c_number, int a_number, int b_number)
{
    tile *c = of(c_number), *a = of(a_number), *b = of(b_number);
    if (!fit(c, a, b))
        return;
    for (int r = 0; r < c->rows; r++) {
        int32_t row[ROW_BYTES / 4];
        memcpy(row, c->data[r], sizeof row);
        multiply_bytes(row, c->row_bytes / 4, (const signed char *)a->data[r], b);
        memcpy(c->data[r], row, sizeof row);
    }
    cpu.products++;
}
