/* Routed experts on CPUs: down(silu(gate(x)) * up(x)) by visits, and its gradients.
 *
 * Products take float32 or, built with BFLOAT16, bfloat16. Their sums and all between them are
 * float32. Widths are even for bfloat16.
 *
 * A thread owns whole experts, so that no sum depends on how many threads there are. What an expert
 * computes of its visits lies in panels: [features][WIDE visits]. A panel is the right side of a
 * product whose left side is a weight matrix, read as it lies; a product's result is the right side
 * of the next one; and seen from the side, panels are the left side of a product over visits, the
 * gradient of a weight. Lanes beyond the last visit repeat the first one of their panel with
 * weight 0; at most one of them is read, where two visits make a word and their number is odd. */
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

/* Registers hold TALL x WIDE sums; both are what the vectors of a processor have room for. */
#if defined(__AVX512F__)
enum { LANES = 16, VECTORS = 2, TALL = 12 };
#elif defined(__AVX__)
enum { LANES = 8, VECTORS = 2, TALL = 6 };
#elif defined(__aarch64__)
enum { LANES = 4, VECTORS = 4, TALL = 6 };
#else
enum { LANES = 4, VECTORS = 2, TALL = 6 };
#endif
enum {
    WIDE = LANES * VECTORS,
    DEEP = 256,   /* terms summed before a panel's next part is fetched: it fits a first cache */
    BLOCK = 128,  /* visits worked on at a time: their panels fit a second cache */
    STRIP = 96,   /* rows of a left side that are used for all panels before the next ones */
    MOST_THREADS = 64,
};

/* What a product reads at once: one float32, or two bfloat16 of successive terms, the first below.
 * A panel of an operand holds [n / HOLDS][WIDE] words, and takes the room of [n][WIDE]. */
#if defined(BFLOAT16)
typedef uint32_t Word;
enum { HOLDS = 2 };
#else
typedef float Word;
enum { HOLDS = 1 };
#endif

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

/* What Python hands over; `_Call` in experts_cpu.py has the same fields in the same order. */
typedef struct {
    int64_t experts, width, inner; /* E, D, I */
    int64_t limited, threads;
    double limit;
    const Word *x;         /* [R][D] */
    const float *gates;    /* [N], or 0: all are 1 */
    const Word *gate_up;   /* [E][2I][D] */
    const Word *down;      /* [E][D][I] */
    const int64_t *rows;   /* [N]: the row of each visit; visits are sorted by expert */
    const int64_t *counts; /* [E] */
    float *saved;          /* panels of gate and up; 0 where no gradient follows */
    Word *y;               /* [N][D] */
    const Word *dy;        /* [R][D]; this and what follows is the backward pass's, else 0 */
    Word *d_x;             /* [N][D] */
    float *d_gates;        /* [N], or 0 */
    float *d_gate_up, *d_down;
    const int64_t *order;  /* [E]: in which experts are taken */
    float *scratch;        /* ingot_experts_scratch floats for each thread */
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, or 0 */
} Call;

/* Floats a thread works in. */
int64_t ingot_experts_scratch(int64_t width, int64_t inner, int64_t learning) {
    int64_t wide = width + WIDE + TALL, inner_wide = inner + WIDE + TALL;
    if (!learning) return BLOCK * (wide + 3 * inner_wide);
    /* What lies otherwise over visits than over features, where two of them make a word. */
    int64_t turned = (HOLDS - 1) * BLOCK * (wide + 3 * inner_wide) / HOLDS;
    return BLOCK * (2 * wide + 4 * inner_wide) + 3 * wide * inner_wide / HOLDS + WIDE + turned;
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (FourInts){__VA_ARGS__})
#endif

/* The left side of a product, in words. Entry (r, k) lies at r * row + k * term; after each `run` terms the
 * next ones lie `jump` further on. Every TALL rows lie TALL * step words from the ones before. */
typedef struct {
    const Word *at;
    int64_t step, row, term, run, jump;
} Left;

/* The right side, by panels [depth][WIDE], which lie `stride` words apart. */
typedef struct {
    const Word *at;
    int64_t stride, columns;
} Right;

/* The result: entry (r, c) of a panel lies at r * row + c, and panels lie `stride` floats apart.
 * Where it is `exact`, nothing may be written beyond the last column. */
typedef struct {
    float *at;
    int64_t row, stride;
    int exact;
} Result;

/* Sums, and a word of the left side times words of the right side. */
#if !defined(BFLOAT16)
INLINE Vec dot(Vec sum, const Word *a, const Word *b) { return sum + *a * *(const Vec *)b; }
#elif defined(__AVX512BF16__)
INLINE Vec dot(Vec sum, const Word *a, const Word *b) {
    return (Vec)_mm512_dpbf16_ps(
        (__m512)sum, (__m512bh)_mm512_set1_epi32((int)*a), (__m512bh)_mm512_loadu_si512(b));
}
#else
INLINE float single(Word bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE Vec dot(Vec sum, const Word *a, const Word *b) {
    Words w = *(const Words *)b;
    sum += single(*a & 0xffff0000u) * (Vec)(w & 0xffff0000u);
    return sum + single(*a << 16) * (Vec)(w << 16);
}
#endif

/* height x (vectors * LANES) sums over `depth` terms; height and vectors are constants. */
INLINE void tile(
    const int height, const int vectors, const Word *a, const Left *l, int64_t depth,
    const Word *b, float *c, int64_t c_row, int add) {
    Vec sum[2 * TALL][VECTORS];
    const int64_t row = l->row, term = l->term, run = l->run, jump = l->jump;
#pragma GCC unroll 32
    for (int r = 0; r < height; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = (Vec){0};
    for (int64_t done = 0; done < depth; done += run, a += jump) {
        const Word *at = a;
        for (int64_t k = least(run, depth - done); k > 0; k--, at += term, b += WIDE) {
#pragma GCC unroll 32
            for (int r = 0; r < height; r++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    sum[r][v] = dot(sum[r][v], at + r * row, b + v * LANES);
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < height; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            Vec *to = (Vec *)(c + r * c_row) + v;
            if (add) sum[r][v] += *to;
            *to = sum[r][v];
        }
}

/* A tile of at most `rows` rows; how many it had. */
#define CASE(height, vectors) \
    if (rows >= (height)) { tile(height, vectors, a, l, depth, b, c, c_row, add); return height; }
static int64_t wide_tile(
    int64_t rows, const Word *a, const Left *l, int64_t depth, const Word *b, float *c,
    int64_t c_row, int add) {
    CASE(TALL, VECTORS)
    CASE(4, VECTORS)
    CASE(2, VECTORS)
    CASE(1, VECTORS)
    return 0;
}
static int64_t narrow_tile(
    int64_t rows, const Word *a, const Left *l, int64_t depth, const Word *b, float *c,
    int64_t c_row, int add) {
    CASE(2 * TALL, 1)
    CASE(TALL, 1)
    CASE(4, 1)
    CASE(2, 1)
    CASE(1, 1)
    return 0;
}

/* Rows [first, end) of the left side times one panel. */
static void panel_product(
    const Left *l, int64_t first, int64_t end, int64_t from, int64_t depth, const Word *b,
    int64_t columns, const Result *c, float *to, int add) {
    int narrow = columns <= LANES;
    int64_t whole = narrow ? LANES : WIDE;
    for (int64_t m = first; m < end;) {
        const Word *a = l->at + (m - m % TALL) * l->step + m % TALL * l->row + from * l->term;
        const Word *right = b + from * WIDE;
        int64_t rows = l->step == l->row ? end - m : least(end - m, TALL - m % TALL);
        float *out = to + m * c->row, edge[2 * TALL * WIDE];
        int64_t out_row = c->row;
        int outside = c->exact && columns < whole, added = add;
        if (outside) out = edge, out_row = WIDE, added = 0;
        int64_t made = narrow ? narrow_tile(rows, a, l, depth, right, out, out_row, added)
                              : wide_tile(rows, a, l, depth, right, out, out_row, added);
        for (int64_t r = 0; outside && r < made; r++)
            for (int64_t i = 0; i < columns; i++) {
                float *entry = to + (m + r) * c->row + i;
                *entry = edge[r * WIDE + i] + (add ? *entry : 0);
            }
        m += made;
    }
}

/* left [height][depth] times right [depth][columns]; depth is counted in words. */
static void product(
    const Left *l, int64_t height, int64_t depth, const Right *b, const Result *c, int add) {
    for (int64_t from = 0; from < depth; from += DEEP)
        for (int64_t first = 0; first < height; first += STRIP)
            for (int64_t p = 0; p * WIDE < b->columns; p++)
                panel_product(
                    l, first, least(first + STRIP, height), from, least(DEEP, depth - from),
                    b->at + p * b->stride, least(WIDE, b->columns - p * WIDE), c,
                    c->at + p * c->stride, add || from);
}

/* to[k * row + 0..3] = the k-th entries of four rows. */
static void turn_four(Word *to, int64_t row, const Word *const from[4], int64_t n) {
    int64_t k = 0;
    for (; k + 4 <= n; k += 4) {
        Four a = *(const Four *)(from[0] + k), b = *(const Four *)(from[1] + k);
        Four c = *(const Four *)(from[2] + k), d = *(const Four *)(from[3] + k);
        Four ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
        *(Four *)(to + k * row) = SHUFFLE(ab, cd, 0, 1, 4, 5);
        *(Four *)(to + (k + 1) * row) = SHUFFLE(ab, cd, 2, 3, 6, 7);
        ab = SHUFFLE(a, b, 2, 6, 3, 7), cd = SHUFFLE(c, d, 2, 6, 3, 7);
        *(Four *)(to + (k + 2) * row) = SHUFFLE(ab, cd, 0, 1, 4, 5);
        *(Four *)(to + (k + 3) * row) = SHUFFLE(ab, cd, 2, 3, 6, 7);
    }
    for (; k < n; k++)
        for (int r = 0; r < 4; r++) to[k * row + r] = from[r][k];
}

/* to[c * to_row + r] = from[r * from_row + c]. */
static void turn(
    Word *to, int64_t to_row, const Word *from, int64_t from_row, int64_t rows, int64_t columns) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        const Word *f = from + r * from_row;
        const Word *const four[4] = {f, f + from_row, f + 2 * from_row, f + 3 * from_row};
        turn_four(to + r, to_row, four, columns);
    }
    for (; r < rows; r++)
        for (int64_t k = 0; k < columns; k++) to[k * to_row + r] = from[r * from_row + k];
}

/* Rows of [][n] as panels of an operand over n. */
static void rows_to_panels(
    Word *to, const Word *from, const int64_t *rows, int64_t count, int64_t n) {
    int64_t words = n / HOLDS;
    for (int64_t p = 0; p < count; p += WIDE, to += n * WIDE)
        for (int64_t j = 0; j < WIDE; j += 4) {
            const Word *four[4];
            for (int64_t r = 0; r < 4; r++)
                four[r] = from + rows[p + j + r < count ? p + j + r : p] * words;
            turn_four(to + j, WIDE, four, words);
        }
}

/* Panels of an operand over n as `count` rows of n. */
static void panels_to_rows(Word *to, const Word *from, int64_t count, int64_t n) {
    int64_t words = n / HOLDS;
    for (int64_t p = 0; p < count; p += WIDE)
        turn(to + p * words, words, from + p * n, WIDE, words, least(WIDE, count - p));
}

/* Panels [n][WIDE / HOLDS] of `count` visits, as `along_visits` gives them, as panels
 * [count / HOLDS][WIDE] of n features. */
static void sides_to_columns(Word *to, const Word *from, int64_t count, int64_t n) {
    const int64_t wide = WIDE / HOLDS, words = parts(count, HOLDS);
    for (int64_t c = 0; c < n; c += WIDE)
        for (int64_t p = 0; p < words; p += wide)
            turn(to + c * words + p * WIDE, WIDE, from + p * n + c * wide, wide,
                 least(WIDE, n - c), least(wide, words - p));
}

#if !defined(BFLOAT16)
/* What is computed is an operand as it lies, over features and over visits. */
INLINE Word *along_features(float *panels, int64_t count, int64_t n) { return panels; }
INLINE Word *along_visits(Word *room, float *panels, int64_t count, int64_t n) { return panels; }
INLINE Word *turned(Word *room, Word *panels, int64_t count, int64_t n) { return panels; }

/* Rows of [][n] as panels [count][WIDE] of their columns. */
static void rows_to_columns(
    Word *to, const Word *from, const int64_t *rows, int64_t count, int64_t n) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t c = 0; c < n; c += WIDE) {
            Word *out = to + c * count + k * WIDE;
            const Word *in = from + rows[k] * n + c;
            if (n - c >= WIDE) memcpy(out, in, WIDE * sizeof(Word));
            else memcpy(out, in, (n - c) * sizeof(Word));
        }
}

/* The transpose of [depth][n] by tiles of TALL columns: [n / TALL][depth][TALL]. */
static void to_tiles(Word *to, const Word *from, int64_t depth, int64_t n) {
    for (int64_t m = 0; m < n; m += TALL)
        for (int64_t k = 0; k < depth; k++, to += TALL) {
            const Word *in = from + k * n + m;
            if (n - m >= TALL) memcpy(to, in, TALL * sizeof(Word));
            else memcpy(to, in, (n - m) * sizeof(Word));
        }
}
#else
/* Bits of the nearest bfloat16, in the upper half; of two as near, the even one. */
INLINE Words rounded(Vec x) {
    Words bits = (Words)x, nearest = bits + 0x7fffu + (bits >> 16 & 1u);
    Words quiet = bits | 0x400000u, is_nan = (Words)(x != x);
    return (is_nan & quiet) | (~is_nan & nearest);
}

/* Panels [n][WIDE] of results as those of an operand over n, in their place. */
static Word *along_features(float *panels, int64_t count, int64_t n) {
    for (int64_t p = 0; p < count; p += WIDE)
        for (int64_t k = 0; k < n; k += 2)
            for (int64_t v = 0; v < WIDE; v += LANES) {
                const float *in = panels + p * n + k * WIDE + v;
                Words low = rounded(*(const Vec *)in), high = rounded(*(const Vec *)(in + WIDE));
                *(Words *)(panels + p * n + k / 2 * WIDE + v) = low >> 16 | (high & 0xffff0000u);
            }
    return (Word *)panels;
}

/* Panels [n][WIDE] of results as [n][WIDE / HOLDS], an operand over visits. */
static Word *along_visits(Word *room, float *panels, int64_t count, int64_t n) {
    Halves *to = (Halves *)room;
    const Vec *from = (const Vec *)panels;
    for (int64_t i = 0; i < parts(count, WIDE) * n * VECTORS; i++)
        to[i] = __builtin_convertvector(rounded(from[i]) >> 16, Halves);
    return room;
}

/* Panels of an operand over n as [n][WIDE / HOLDS], an operand over visits. */
static Word *turned(Word *room, Word *panels, int64_t count, int64_t n) {
    Halves *to = (Halves *)room;
    for (int64_t p = 0; p < count; p += WIDE)
        for (int64_t k = 0; k < n; k += 2)
            for (int64_t v = 0; v < VECTORS; v++) {
                Words in = *(const Words *)(panels + p * n + k / 2 * WIDE + v * LANES);
                Halves *out = to + (p * n / WIDE + k) * VECTORS + v;
                out[0] = __builtin_convertvector(in, Halves);
                out[VECTORS] = __builtin_convertvector(in >> 16, Halves);
            }
    return room;
}

/* Terms k and k + 1 of n columns, as words. */
INLINE void paired(Word *to, const uint16_t *first, const uint16_t *second, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Words low = __builtin_convertvector(*(const Halves *)(first + i), Words);
        Words high = __builtin_convertvector(*(const Halves *)(second + i), Words);
        *(Words *)(to + i) = low | high << 16;
    }
    for (; i < n; i++) to[i] = first[i] | (Word)second[i] << 16;
}

/* Rows of [][n] as panels [count / 2][WIDE] of their columns; 0 for a row that an odd count lacks. */
static void rows_to_columns(
    Word *to, const Word *from, const int64_t *rows, int64_t count, int64_t n) {
    static const uint16_t none[WIDE];
    int64_t words = parts(count, 2);
    for (int64_t k = 0; k < count; k += 2)
        for (int64_t c = 0; c < n; c += WIDE) {
            const uint16_t *first = (const uint16_t *)(from + rows[k] * (n / 2)) + c;
            const uint16_t *second = none;
            if (k + 1 < count) second = (const uint16_t *)(from + rows[k + 1] * (n / 2)) + c;
            paired(to + c * words + k / 2 * WIDE, first, second, least(WIDE, n - c));
        }
}

/* The transpose of [depth][n] by tiles of TALL columns: [n / TALL][depth / 2][TALL]. */
static void to_tiles(Word *to, const Word *from, int64_t depth, int64_t n) {
    for (int64_t m = 0; m < n; m += TALL)
        for (int64_t k = 0; k < depth; k += 2, to += TALL) {
            const uint16_t *in = (const uint16_t *)from + k * n + m;
            /* A whole vector if it holds a row of the tile; the next row overwrites the rest. */
            paired(to, in, in + n, LANES > TALL && n - m >= LANES ? LANES : least(TALL, n - m));
        }
}
#endif

/* Lane by lane: `yes` where the comparison holds. */
INLINE Vec pick(Ints holds, Vec yes, Vec no) {
    return (Vec)((holds & (Ints)yes) | (~holds & (Ints)no));
}

/* e^x between -87 and 88, to 2 units in the last place; beyond, as at the ends. */
INLINE Vec exponential(Vec x) {
    const Vec none = {0}, magic = none + 0x1.8p23f;
    x = pick(x > 88.0f, none + 88.0f, x);
    x = pick(x < -87.0f, none - 87.0f, x);
    Vec shifted = x * 0x1.715476p0f + magic, n = shifted - magic;
    Vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec p = none + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (Vec)((Ints)p + ((Ints)shifted << 23));
}

/* Gate and up of one feature and some visits, within the limit. */
typedef struct {
    Vec gate, up, sigmoid;
} Cut;

INLINE Cut cut(const Call *t, Vec gate, Vec up) {
    if (t->limited) {
        Vec most = (Vec){0} + (float)t->limit;
        gate = pick(gate > most, most, gate);
        up = pick(up > most, most, up);
        up = pick(up < -most, -most, up);
    }
    return (Cut){gate, up, 1.0f / (1.0f + exponential(-gate))};
}

/* silu(gate) * up * weight: a panel [2I][WIDE] to one of [I][WIDE]. */
static void activate(const Call *t, const float *inner, const float *weight, float *out) {
    int64_t n = t->inner * WIDE;
    for (int64_t i = 0; i < n; i += LANES) {
        Cut s = cut(t, *(const Vec *)(inner + i), *(const Vec *)(inner + n + i));
        *(Vec *)(out + i) = s.gate * s.sigmoid * s.up * *(const Vec *)(weight + i % WIDE);
    }
}

/* From dy, the gradient of weight * activation: that of gate and up into d_inner; weight *
 * activation, made again, over dy; that of the weight into d_weight. */
static void activate_backward(
    const Call *t, const float *inner, const float *weight, float *dy, float *d_inner,
    float *d_weight) {
    int64_t n = t->inner * WIDE;
    Vec sums[VECTORS] = {{0}};
    const Vec none = {0}, most = none + (float)t->limit;
    for (int64_t i = 0; i < n; i += WIDE)
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = i + v * LANES;
            Vec gate = *(const Vec *)(inner + at), up = *(const Vec *)(inner + n + at);
            Cut s = cut(t, gate, up);
            Vec silu = s.gate * s.sigmoid, y = silu * s.up, d = *(const Vec *)(dy + at);
            Vec w = ((const Vec *)weight)[v];
            sums[v] += d * y;
            d *= w;
            Vec d_up = d * silu;
            Vec d_gate = d * s.up * (s.sigmoid * (1.0f + s.gate * (1.0f - s.sigmoid)));
            if (t->limited) {
                d_gate = pick(gate > most, none, d_gate);
                d_up = pick(up > most, none, d_up);
                d_up = pick(up < -most, none, d_up);
            }
            *(Vec *)(d_inner + at) = d_gate;
            *(Vec *)(d_inner + n + at) = d_up;
            *(Vec *)(dy + at) = y * w;
        }
    memcpy(d_weight, sums, sizeof sums);
}

/* One expert's share of a call. */
typedef struct {
    int64_t expert, first, count; /* its visits */
    float *saved;                 /* its panels of gate and up */
    float *scratch;
} Share;

static void weights_of(const Call *t, int64_t first, int64_t count, float weight[WIDE]) {
    for (int64_t i = 0; i < WIDE; i++)
        weight[i] = i >= count ? 0 : t->gates ? t->gates[first + i] : 1;
}

INLINE Left matrix(const Word *at, int64_t columns) {
    int64_t words = columns / HOLDS;
    return (Left){at, words, words, 1, INT64_MAX / 2, 0};
}
INLINE Left tiles(const Word *at, int64_t depth) {
    return (Left){at, depth / HOLDS, 1, TALL, INT64_MAX / 2, 0};
}
INLINE Left sideways(const Word *sides, int64_t features) {
    const int64_t wide = WIDE / HOLDS;
    return (Left){sides, wide, wide, 1, wide, features * wide};
}
INLINE Right visits_of(const Word *panels, int64_t features, int64_t count) {
    return (Right){panels, features * WIDE, count};
}
INLINE Result to_panels(float *panels, int64_t features) {
    return (Result){panels, WIDE, features * WIDE, 0};
}
INLINE Result to_matrix(float *at, int64_t columns) { return (Result){at, columns, WIDE, 1}; }

static void forward(const Call *t, const Share *s) {
    int64_t D = t->width, I = t->inner, J = 2 * I;
    Left gate_up = matrix(t->gate_up + s->expert * J * D / HOLDS, D);
    Left down = matrix(t->down + s->expert * D * I / HOLDS, I);
    float *y = s->scratch, *active = y + BLOCK * D, *room = active + BLOCK * I;
    Word *x = (Word *)y; /* it is read before y is made */
    for (int64_t done = 0; done < s->count; done += BLOCK) {
        int64_t first = s->first + done, count = least(BLOCK, s->count - done);
        float *inner = t->saved ? s->saved + done * J : room;
        rows_to_panels(x, t->x, t->rows + first, count, D);
        Right x_panels = visits_of(x, D, count);
        Result inner_out = to_panels(inner, J), y_out = to_panels(y, D);
        product(&gate_up, J, D / HOLDS, &x_panels, &inner_out, 0);
        for (int64_t p = 0; p < count; p += WIDE) {
            float weight[WIDE];
            weights_of(t, first + p, count - p, weight);
            activate(t, inner + p * J, weight, active + p * I);
        }
        Right active_panels = visits_of(along_features(active, count, I), I, count);
        product(&down, D, I / HOLDS, &active_panels, &y_out, 0);
        panels_to_rows(t->y + first * D / HOLDS, along_features(y, count, D), count, D);
    }
}

static void backward(const Call *t, const Share *s) {
    int64_t D = t->width, I = t->inner, J = 2 * I;
    int64_t wide_D = parts(D, WIDE) * WIDE, wide_I = parts(I, WIDE) * WIDE;
    float *d_gate_up = t->d_gate_up + s->expert * J * D, *d_down = t->d_down + s->expert * D * I;
    float *d_x = s->scratch, *active = d_x + BLOCK * wide_D, *d_inner = active + BLOCK * I;
    Word *x = (Word *)d_x; /* it is made when d_x has been read */
    Word *dy = (Word *)(d_inner + BLOCK * J), *active_columns = dy + BLOCK * D;
    Word *gate_up = active_columns + BLOCK * wide_I;
    Word *down = gate_up + (D + TALL) * J / HOLDS, *room_D = down + (I + TALL) * D / HOLDS + WIDE;
    Word *room_J = room_D + BLOCK * D / HOLDS, *room_I = room_J + BLOCK * J / HOLDS;
    if (!s->count) {
        memset(d_gate_up, 0, J * D * sizeof(float));
        memset(d_down, 0, D * I * sizeof(float));
        return;
    }
    to_tiles(gate_up, t->gate_up + s->expert * J * D / HOLDS, J, D);
    to_tiles(down, t->down + s->expert * D * I / HOLDS, D, I);
    Left from_dy = tiles(down, D), from_inner = tiles(gate_up, J);
    Result active_out = to_panels(active, I), x_out = to_panels(d_x, D);
    Result d_down_out = to_matrix(d_down, I), d_gate_up_out = to_matrix(d_gate_up, D);
    for (int64_t done = 0; done < s->count; done += BLOCK) {
        int64_t first = s->first + done, count = least(BLOCK, s->count - done);
        const float *inner = s->saved + done * J;
        rows_to_panels(dy, t->dy, t->rows + first, count, D);
        Right dy_panels = visits_of(dy, D, count);
        product(&from_dy, I, D / HOLDS, &dy_panels, &active_out, 0);
        for (int64_t p = 0; p < count; p += WIDE) {
            float weight[WIDE], d_weight[WIDE];
            weights_of(t, first + p, count - p, weight);
            activate_backward(t, inner + p * J, weight, active + p * I, d_inner + p * J, d_weight);
            if (t->d_gates)
                memcpy(t->d_gates + first + p, d_weight, least(WIDE, count - p) * sizeof(float));
        }
        Left dy_sideways = sideways(turned(room_D, dy, count, D), D);
        Left inner_sideways = sideways(along_visits(room_J, d_inner, count, J), J);
        sides_to_columns(active_columns, along_visits(room_I, active, count, I), count, I);
        Right d_inner_panels = visits_of(along_features(d_inner, count, J), J, count);
        product(&from_inner, D, J / HOLDS, &d_inner_panels, &x_out, 0);
        panels_to_rows(t->d_x + first * D / HOLDS, along_features(d_x, count, D), count, D);
        rows_to_columns(x, t->x, t->rows + first, count, D);
        int64_t words = parts(count, HOLDS);
        Right columns_I = {active_columns, words * WIDE, I}, columns_D = {x, words * WIDE, D};
        product(&dy_sideways, D, words, &columns_I, &d_down_out, done > 0);
        product(&inner_sideways, J, words, &columns_D, &d_gate_up_out, done > 0);
    }
}

typedef struct {
    const Call *call;
    void (*work)(const Call *, const Share *);
    int64_t arrived, begun; /* threads, experts */
} Team;

/* Which thread takes an expert changes no result. */
static void take_experts(void *team) {
    Team *m = team;
    const Call *t = m->call;
    int64_t room = ingot_experts_scratch(t->width, t->inner, t->dy != 0);
    Share s = {.scratch = t->scratch + room * __atomic_fetch_add(&m->arrived, 1, __ATOMIC_RELAXED)};
    for (;;) {
        int64_t turn = __atomic_fetch_add(&m->begun, 1, __ATOMIC_RELAXED), panels = 0;
        if (turn >= t->experts) return;
        s.expert = t->order[turn], s.count = t->counts[s.expert], s.first = 0;
        for (int64_t e = 0; e < s.expert; e++)
            s.first += t->counts[e], panels += parts(t->counts[e], WIDE);
        s.saved = t->saved + panels * WIDE * 2 * t->inner;
        m->work(t, &s);
    }
}

static void *take_experts_alone(void *team) {
    take_experts(team);
    return 0;
}

static void divide(const Call *t, void (*work)(const Call *, const Share *)) {
    Team team = {t, work, 0, 0};
    pthread_t others[MOST_THREADS];
    int started[MOST_THREADS] = {0};
    int64_t threads = least(least(t->threads, t->experts), MOST_THREADS);
    if (t->parallel && threads > 1) {
        t->parallel(take_experts, &team, (unsigned)threads, 0);
        return;
    }
    for (int64_t i = 1; i < threads; i++)
        started[i] = !pthread_create(&others[i], 0, take_experts_alone, &team);
    take_experts(&team);
    for (int64_t i = 1; i < threads; i++)
        if (started[i]) pthread_join(others[i], 0);
}

void ingot_experts_forward(const Call *call) { divide(call, forward); }
void ingot_experts_backward(const Call *call) { divide(call, backward); }

/* Visits in a panel. */
int64_t ingot_experts_wide(void) { return WIDE; }
