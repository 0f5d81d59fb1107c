/* Block-scaled E4M3 and E5M6 on CPUs: quantise and dequantise. The numbers are those of
 * reference.py, bit for bit: plain IEEE float32 arithmetic in the same order, so compile without
 * -ffast-math and without contraction.
 *
 * Work goes by panels: the rows of one band (those that share scales) times at most 128 columns. A
 * panel has one scale, or one for each of its columns. */
#include <pthread.h>
#include <stdint.h>
#include <string.h>

enum { PANEL = 128, MOST_THREADS = 64 };

static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

typedef struct {
    const float *x;           /* [rows][columns], or 0 where the source is codes */
    const uint8_t *codes;     /* E4M3 [rows][columns] */
    const float *code_scales; /* one for each band and panel, or each band and column */
    const int64_t *starts;    /* first row of each band, then the end; 0: a band is a row */
    int64_t columns, bands;
    int per_column, power_of_two;
    float *float32;              /* results; either may be 0 */
    uint8_t *out;
    float *scales;
} Task;

/* One rounding to the grid: see round_to_grid in format.py. */
static inline float to_grid(float v) {
    float leading = float_of(bits_of(v) & 0x7F800000u);
    float magic = (leading < 0x1p-6f ? 0x1p-6f : leading) * 0x1.8p20f;
    return (v + magic) - magic;
}

/* The code of a value on the grid; the sign comes from the value before it was rounded. */
static inline uint8_t encode(float rounded, float before) {
    uint32_t u = bits_of(rounded) & 0x7FFFFFFFu;
    uint32_t normal = (u >> 20) - (120u << 3);
    /* Beyond the subnormals it is not used, and need only fit an int32. */
    uint32_t low = u < (121u << 23) ? u : 0;
    uint32_t small = (uint32_t)(int32_t)(float_of(low) * 512.0f);
    uint32_t code = (u < (121u << 23) ? small : normal) | (bits_of(before) >> 24 & 0x80u);
    return (uint8_t)(u > 0x7F800000u ? 0x7Fu : code);
}

static inline float decode(uint8_t code) {
    uint32_t bits8 = code, magnitude = bits8 & 0x7Fu;
    /* Codes below 8 have no leading one: it is lent, and taken back. */
    uint32_t lent = magnitude < 8 ? 121u << 23 : 120u << 23;
    float value = float_of((magnitude << 20) + lent) - (magnitude < 8 ? 0x1p-6f : 0.0f);
    uint32_t bits = magnitude == 0x7Fu ? 0x7FC00000u : bits_of(value);
    return float_of(bits | (bits8 & 0x80u) << 24);
}

static inline float scale_of(uint32_t amax, float largest, int power_of_two) {
    if (amax >= 0x7F800000u) return float_of(0x7FC00000u);
    float scale = float_of(amax) / largest;
    if (scale < 0x1p-126f) return 1.0f;
    return power_of_two ? float_of((bits_of(scale) + 0x7FFFFFu) & 0x7F800000u) : scale;
}

/* What follows until quantize_panel works on one row of at most PANEL values. Compilers turn such
 * loops into vector code when they stand alone; hence functions that are never inlined. */
#define ROW static __attribute__((noinline)) void
#define EACH for (int64_t i = 0; i < n; i++)

ROW row_amax(const float *restrict x, uint32_t *restrict amax, int64_t n) {
    uint32_t most = *amax;
    EACH {
        uint32_t u = bits_of(x[i]) & 0x7FFFFFFFu;
        most = u > most ? u : most;
    }
    *amax = most;
}

ROW column_amax(const float *restrict x, uint32_t *restrict amax, int64_t n) {
    EACH {
        uint32_t u = bits_of(x[i]) & 0x7FFFFFFFu;
        amax[i] = u > amax[i] ? u : amax[i];
    }
}

ROW row_grid(const float *restrict x, float scale, float *restrict grid, int64_t n) {
    EACH grid[i] = to_grid(x[i] / scale);
}

ROW column_grid(const float *restrict x, const float *restrict scale, float *restrict grid, int64_t n) {
    EACH grid[i] = to_grid(x[i] / scale[i]);
}

ROW row_float32(const float *restrict grid, float scale, float *restrict float32, int64_t n) {
    EACH float32[i] = grid[i] * scale;
}

ROW column_float32(const float *restrict grid, const float *restrict scale, float *restrict float32, int64_t n) {
    EACH float32[i] = grid[i] * scale[i];
}

ROW row_codes(const float *restrict grid, const float *restrict before, uint8_t *restrict out, int64_t n) {
    EACH out[i] = encode(grid[i], before[i]);
}

ROW row_dequantize(const uint8_t *restrict codes, float scale, float *restrict float32, int64_t n) {
    EACH float32[i] = decode(codes[i]) * scale;
}

ROW column_dequantize(const uint8_t *restrict codes, const float *restrict scale, float *restrict float32, int64_t n) {
    EACH float32[i] = decode(codes[i]) * scale[i];
}

/* `from` has rows of `stride` floats. */
static void quantize_panel(
    const Task *t, const float *from, int64_t stride, int64_t band, int64_t first, int64_t rows,
    int64_t left, int64_t n) {
    uint32_t amax[PANEL] = {0};
    float scale[PANEL], grid[PANEL], one = 1;
    if (t->per_column) {
        for (int64_t r = 0; r < rows; r++) column_amax(from + r * stride, amax, n);
        EACH scale[i] = scale_of(amax[i], 448.0f, t->power_of_two);
        memcpy(t->scales + band * t->columns + left, scale, n * sizeof(float));
    } else {
        for (int64_t r = 0; r < rows; r++) row_amax(from + r * stride, amax, n);
        one = scale_of(amax[0], 448.0f, t->power_of_two);
        t->scales[band * ((t->columns + PANEL - 1) / PANEL) + left / PANEL] = one;
    }
    for (int64_t r = 0; r < rows; r++) {
        const float *x = from + r * stride;
        int64_t at = (first + r) * t->columns + left;
        if (t->per_column) column_grid(x, scale, grid, n);
        else row_grid(x, one, grid, n);
        if (t->out) row_codes(grid, x, t->out + at, n);
        if (t->float32 && t->per_column) column_float32(grid, scale, t->float32 + at, n);
        else if (t->float32) row_float32(grid, one, t->float32 + at, n);
    }
}

/* Codes that are read here were quantised by rows: a scale for each row and panel. */
static void one_panel(
    const Task *t, int64_t band, int64_t first, int64_t rows, int64_t left, int64_t n) {
    int64_t panels = (t->columns + PANEL - 1) / PANEL, at = first * t->columns + left;
    float decoded[PANEL * PANEL];
    if (t->x) {
        quantize_panel(t, t->x + at, t->columns, band, first, rows, left, n);
        return;
    }
    for (int64_t r = 0; r < rows; r++) {
        float scale = t->code_scales[(first + r) * panels + left / PANEL];
        row_dequantize(t->codes + at + r * t->columns, scale, decoded + r * PANEL, n);
    }
    quantize_panel(t, decoded, PANEL, band, first, rows, left, n);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void quantize_bands(const Task *t, int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; band++) {
        int64_t first = t->starts ? t->starts[band] : band;
        int64_t rows = t->starts ? t->starts[band + 1] - first : 1;
        for (int64_t left = 0; left < t->columns; left += PANEL)
            one_panel(t, band, first, rows, left, least(PANEL, t->columns - left));
    }
}

static void dequantize_bands(const Task *t, int64_t begin, int64_t end) {
    int64_t panels = (t->columns + PANEL - 1) / PANEL;
    for (int64_t band = begin; band < end; band++) {
        int64_t first = t->starts ? t->starts[band] : band;
        int64_t last = t->starts ? t->starts[band + 1] : band + 1;
        for (int64_t r = first; r < last; r++) {
            const uint8_t *codes = t->codes + r * t->columns;
            float *float32 = t->float32 + r * t->columns;
            if (t->per_column) {
                column_dequantize(codes, t->code_scales + band * t->columns, float32, t->columns);
                continue;
            }
            for (int64_t left = 0; left < t->columns; left += PANEL) {
                float scale = t->code_scales[band * panels + left / PANEL];
                row_dequantize(codes + left, scale, float32 + left, least(PANEL, t->columns - left));
            }
        }
    }
}

typedef struct {
    void (*work)(const Task *, int64_t, int64_t);
    const Task *task;
    int64_t begin, end;
} Part;

static void *run_part(void *part) {
    const Part *p = part;
    p->work(p->task, p->begin, p->end);
    return 0;
}

/* Threads live for one call: they cost tens of microseconds, so callers ask for few in small work. */
static void divide(void (*work)(const Task *, int64_t, int64_t), const Task *task, int64_t threads) {
    pthread_t others[MOST_THREADS];
    Part parts[MOST_THREADS];
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > task->bands) threads = task->bands;
    if (threads < 1) threads = 1;
    int started[MOST_THREADS] = {0};
    for (int64_t i = 0; i < threads; i++) {
        parts[i] = (Part){work, task, task->bands * i / threads, task->bands * (i + 1) / threads};
        if (i) started[i] = !pthread_create(&others[i], 0, run_part, &parts[i]);
    }
    run_part(&parts[0]);
    for (int64_t i = 1; i < threads; i++) {
        if (started[i]) pthread_join(others[i], 0);
        else run_part(&parts[i]);
    }
}

void ingot_quantize(
    const float *x, const uint8_t *codes, const float *code_scales, const int64_t *starts,
    int64_t bands, int64_t columns, int64_t per_column, int64_t power_of_two, float *float32,
    uint8_t *out, float *scales, int64_t threads) {
    Task task = {x, codes, code_scales, starts, columns, bands,
                 (int)per_column, (int)power_of_two, float32, out, scales};
    divide(quantize_bands, &task, threads);
}

void ingot_dequantize(
    const uint8_t *codes, const float *scales, const int64_t *starts, int64_t bands,
    int64_t columns, int64_t per_column, float *float32, int64_t threads) {
    Task task = {0, codes, scales, starts, columns, bands, (int)per_column, 0, float32, 0, 0};
    divide(dequantize_bands, &task, threads);
}

/* E5M6 by rows, scales powers of two: see to_e5m6 and pack_e5m6 in format.py. */

static inline uint32_t encode_e5m6(float v) {
    uint32_t u = bits_of(v), magnitude = u & 0x7FFFFFFFu, exponent = magnitude >> 23;
    exponent = exponent < 113 ? 113 : exponent;
    /* 1.5 * 2^(e + 17) has a last bit of 2^(e - 6), so that the addition rounds. */
    float magic = float_of((exponent + 17) << 23) * 1.5f;
    uint32_t rounded = bits_of((float_of(magnitude) + magic) - magic);
    uint32_t low = rounded < (113u << 23) ? rounded : 0;
    uint32_t small = (uint32_t)(int32_t)(float_of(low) * 0x1p20f);
    uint32_t code = rounded < (113u << 23) ? small : (rounded >> 17) - (112u << 6);
    return code | (u >> 20 & 0x800u);
}

static inline float decode_e5m6(uint32_t code) {
    uint32_t magnitude = code & 0x7FFu;
    uint32_t lent = magnitude < 64 ? 113u << 23 : 112u << 23;
    float value = float_of((magnitude << 17) + lent) - (magnitude < 64 ? 0x1p-14f : 0.0f);
    return float_of(bits_of(value) | (code & 0x800u) << 20);
}

ROW row_encode_e5m6(const float *restrict x, float scale, uint32_t *restrict code, int64_t n) {
    EACH code[i] = encode_e5m6(x[i] / scale);
}

ROW row_decode_e5m6(const uint32_t *restrict code, float scale, float *restrict float32, int64_t n) {
    EACH float32[i] = decode_e5m6(code[i]) * scale;
}

static void quantize_e5m6_bands(const Task *t, int64_t begin, int64_t end) {
    int64_t panels = (t->columns + PANEL - 1) / PANEL, words = (t->columns + 7) / 8 * 3;
    for (int64_t row = begin; row < end; row++) {
        for (int64_t left = 0; left < t->columns; left += PANEL) {
            int64_t n = least(PANEL, t->columns - left);
            const float *x = t->x + row * t->columns + left;
            uint32_t code[PANEL] = {0}, amax = 0;
            row_amax(x, &amax, n);
            float scale = scale_of(amax, 65024.0f, 1);
            t->scales[row * panels + left / PANEL] = scale;
            if (scale == scale) row_encode_e5m6(x, scale, code, n);
            uint32_t *to = (uint32_t *)t->out + row * words + left / 8 * 3;
            for (int64_t g = 0; g < (n + 7) / 8; g++) {
                const uint32_t *k = code + 8 * g;
                to[3 * g] = k[0] | k[1] << 12 | k[2] << 24;
                to[3 * g + 1] = k[2] >> 8 | k[3] << 4 | k[4] << 16 | k[5] << 28;
                to[3 * g + 2] = k[5] >> 4 | k[6] << 8 | k[7] << 20;
            }
        }
    }
}

static void dequantize_e5m6_bands(const Task *t, int64_t begin, int64_t end) {
    int64_t panels = (t->columns + PANEL - 1) / PANEL, words = (t->columns + 7) / 8 * 3;
    for (int64_t row = begin; row < end; row++) {
        for (int64_t left = 0; left < t->columns; left += PANEL) {
            int64_t n = least(PANEL, t->columns - left);
            const uint32_t *from = (const uint32_t *)t->codes + row * words + left / 8 * 3;
            uint32_t code[PANEL];
            for (int64_t g = 0; g < (n + 7) / 8; g++) {
                uint32_t a = from[3 * g], b = from[3 * g + 1], c = from[3 * g + 2];
                uint32_t *k = code + 8 * g;
                k[0] = a & 0xFFF, k[1] = a >> 12 & 0xFFF, k[2] = (a >> 24 | b << 8) & 0xFFF;
                k[3] = b >> 4 & 0xFFF, k[4] = b >> 16 & 0xFFF, k[5] = (b >> 28 | c << 4) & 0xFFF;
                k[6] = c >> 8 & 0xFFF, k[7] = c >> 20;
            }
            float scale = t->code_scales[row * panels + left / PANEL];
            row_decode_e5m6(code, scale, t->float32 + row * t->columns + left, n);
        }
    }
}

void ingot_quantize_e5m6(
    const float *x, int64_t rows, int64_t columns, uint32_t *words, float *scales,
    int64_t threads) {
    Task task = {x, 0, 0, 0, columns, rows, 0, 1, 0, (uint8_t *)words, scales};
    divide(quantize_e5m6_bands, &task, threads);
}

void ingot_dequantize_e5m6(
    const uint32_t *words, const float *scales, int64_t rows, int64_t columns, float *float32,
    int64_t threads) {
    Task task = {0, (const uint8_t *)words, scales, 0, columns, rows, 0, 0, float32, 0, 0};
    divide(dequantize_e5m6_bands, &task, threads);
}
