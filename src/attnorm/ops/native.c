/* The whole Attentive Normalization layer on the CPU (Eq. 3 to 6 with weighted instance moments): forward, backward and
   the backward of the backward.

   Nothing of the size of the feature map is stored but the output: maps are read in blocks of pixels that stay in the
   cache, and what the second pass over the pixels needs of the first, layout and value, is computed again or, where
   it fits, kept. Every product is the same register-blocked kernel.

   N images, C channels, K entities, P pixels an image.
   CM, "channel-major": a tile [rows][line] of a block of pixels, one row a channel, vectors run over pixels.
   PM, "pixel-major": a tile [pixels][line], one row a pixel, vectors run over channels.
   Sums over channels want CM, sums over pixels PM.

   x is centred as it is read, by the mean xs of a sample of the image's pixels: with v = W (x - xs) all moments are
   taken about W xs + bias, near the image's mean, so that one pass in float32 keeps its digits. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Vector length, and the block of sums that the registers hold: ROWS x VECTORS, one vector an operand to spare. */
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#define SUM_ROWS 4
#elif defined(__AVX__)
#define LANES 8
#define ROWS 4
#define SUM_ROWS 1
#else
#define LANES 4
#define ROWS 8
#define SUM_ROWS 1
#endif
#define VECTORS 2
#define STEP (LANES * VECTORS) /* tiles are this many pixels, or a multiple */
#define MAX_SHARES 256
#define SMALLEST_AREA 1e-12f /* as in regional_norm.py */
#define SAMPLES 16           /* runs of SAMPLES pixels in the sample that x is centred by, and pixels in a run */

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));
typedef float uvec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t uhvec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE vec load(const float *p) { return *(const uvec *)p; }
INLINE void store(float *p, vec v) { *(uvec *)p = v; }
INLINE long up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE vec larger(vec a, vec b) {
    ivec where = a > b;
    return (vec)(((ivec)a & where) | ((ivec)b & ~where));
}

INLINE float sum_lanes(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* 2^x for x <= 0, to 2e-7 of the value; 0 below the smallest normal number; NaN for NaN. */
INLINE vec exp2_vec(vec x) {
    const float round = 12582912.f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    vec shifted = x + round;
    vec f = x - (shifted - round); /* in [-1/2, 1/2]: Taylor's series of 2^f errs by 1e-8 */
    vec p = 1.5403530e-4f * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    vec scale = (vec)(((ivec)shifted << 23) + (127 << 23));
    ivec tiny = x < -126.f;
    return (vec)((ivec)(p * scale) & ~tiny);
}

/* ---- Products ---------------------------------------------------------------------------------------------------- */

#if ROWS > 4
#define FOR_ROWS(rows, CALL)                                                                                           \
    switch (rows) {                                                                                                    \
        case 1: CALL(1); break;                                                                                        \
        case 2: CALL(2); break;                                                                                        \
        case 3: CALL(3); break;                                                                                        \
        case 4: CALL(4); break;                                                                                        \
        case 5: CALL(5); break;                                                                                        \
        case 6: CALL(6); break;                                                                                        \
        case 7: CALL(7); break;                                                                                        \
        case 8: CALL(8); break;                                                                                        \
    }
#else
#define FOR_ROWS(rows, CALL)                                                                                           \
    switch (rows) {                                                                                                    \
        case 1: CALL(1); break;                                                                                        \
        case 2: CALL(2); break;                                                                                        \
        case 3: CALL(3); break;                                                                                        \
        case 4: CALL(4); break;                                                                                        \
    }
#endif

/* sum[r][j] += sum_k a[r * a_row + k] b[k][j], in registers once it is inlined with constant rows and vectors. */
INLINE void accumulate(const int rows, const int vectors, long depth, const float *a, long a_row, const float *b,
                       long b_line, vec sum[ROWS][VECTORS]) {
    for (long k = 0; k < depth; k++, a++, b += b_line) {
        vec operand[VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) operand[j] = load(b + j * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            float scalar = a[r * a_row];
            UNROLL for (int j = 0; j < vectors; j++) sum[r][j] += scalar * operand[j];
        }
    }
}

INLINE void product_rows(const int rows, const int vectors, long depth, const float *a, long a_row, const float *b,
                         long b_line, const float *start, const float *base, long base_line, float *c, long c_line) {
    vec sum[ROWS][VECTORS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < vectors; j++)
        sum[r][j] = (vec){0} + (start ? start[r] : 0.f);
    accumulate(rows, vectors, depth, a, a_row, b, b_line, sum);
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < vectors; j++) {
        if (base) sum[r][j] += load(base + r * base_line + j * LANES);
        store(c + r * c_line + j * LANES, sum[r][j]);
    }
}

/* c [m][n] = a [m][depth] b [depth][n] + start [m] + base [m][n]; NULL for 0; n is a multiple of LANES. */
static void product(long m, long n, long depth, const float *a, long a_row, const float *b, long b_line,
                    const float *start, const float *base, long base_line, float *c, long c_line) {
    for (long j = 0; j < n; j += STEP)
        for (long i = 0; i < m; i += ROWS) {
            const float *rows = a + i * a_row, *starts = start ? start + i : NULL;
            const float *bases = base ? base + i * base_line + j : NULL;
            float *to = c + i * c_line + j;
#define PRODUCT_2(R) product_rows(R, 2, depth, rows, a_row, b + j, b_line, starts, bases, base_line, to, c_line)
#define PRODUCT_1(R) product_rows(R, 1, depth, rows, a_row, b + j, b_line, starts, bases, base_line, to, c_line)
            if (n - j >= STEP) {
                FOR_ROWS(least(ROWS, m - i), PRODUCT_2)
            } else {
                FOR_ROWS(least(ROWS, m - i), PRODUCT_1)
            }
        }
}

INLINE void pair_rows(const int rows, long depth, const float *a, long a_row, const float *y, const float *z,
                      long line, float *c, float *c2, long c_line) {
    vec first[ROWS], second[ROWS];
    UNROLL for (int r = 0; r < rows; r++) first[r] = second[r] = (vec){0};
    for (long k = 0; k < depth; k++, a++, y += line, z += line) {
        vec yk = load(y), yz = yk * load(z);
        UNROLL for (int r = 0; r < rows; r++) {
            first[r] += a[r * a_row] * yk;
            second[r] += a[r * a_row] * yz;
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        store(c + r * c_line, load(c + r * c_line) + first[r]);
        store(c2 + r * c_line, load(c2 + r * c_line) + second[r]);
    }
}

/* c [m][n] += a y, c2 [m][n] += a (y * z), for PM tiles y and z of `depth` pixels and a CM tile a of m rows. */
static void product_pair(long m, long n, long depth, const float *a, long a_row, const float *y, const float *z,
                         long line, float *c, float *c2, long c_line) {
    for (long j = 0; j < n; j += LANES)
        for (long i = 0; i < m; i += ROWS) {
            long at = i * c_line + j;
#define PAIR(R) pair_rows(R, depth, a + i * a_row, a_row, y + j, z + j, line, c + at, c2 + at, c_line)
            FOR_ROWS(least(ROWS, m - i), PAIR)
        }
}

/* A CM block in memory. */
typedef struct {
    float *at;
    long line;
} tile;

INLINE void mix_rows(const int rows, long k, const float *a, const float *b, const float *s, long s_line,
                     const float *v, long v_line, const float *x, long x_line, float *out, long out_line) {
    vec sum[ROWS][VECTORS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < VECTORS; j++) sum[r][j] = (vec){0};
    accumulate(rows, VECTORS, k, a, k, s, s_line, sum);
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < VECTORS; j++)
        sum[r][j] *= load(v + r * v_line + j * LANES);
    accumulate(rows, VECTORS, k, b, k, s, s_line, sum);
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < VECTORS; j++) {
        if (x) sum[r][j] += load(x + r * x_line + j * LANES);
        store(out + r * out_line + j * LANES, sum[r][j]);
    }
}

/* out [c][n] = v * (a S) + b S + x, with a [c][k] and b [c][k] one after the other; x may be NULL, out may be v. */
static void mix(long c, long n, long k, const float *ab, tile s, tile v, const float *x, long x_line, tile out) {
    for (long j = 0; j < n; j += STEP)
        for (long i = 0; i < c; i += ROWS) {
            const float *a = ab + i * k, *b = a + c * k, *residual = x ? x + i * x_line + j : NULL;
#define MIX(R)                                                                                                         \
    mix_rows(R, k, a, b, s.at + j, s.line, v.at + i * v.line + j, v.line, residual, x_line, out.at + i * out.line + j, \
             out.line)
            FOR_ROWS(least(ROWS, c - i), MIX)
        }
}

INLINE void slope_rows(const int rows, long c, long k, const float *coefficients, tile s, tile v, tile operands,
                       float *dv) {
    vec sum[ROWS][VECTORS], other[ROWS][VECTORS];
    long line = operands.line;
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < VECTORS; j++)
        sum[r][j] = other[r][j] = (vec){0};
    accumulate(rows, VECTORS, k, coefficients, k, s.at, s.line, other);
    accumulate(rows, VECTORS, k, coefficients + c * k, k, s.at, s.line, sum);
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < VECTORS; j++) {
        float *g = operands.at + r * line + j * LANES;
        vec gj = load(g), vj = load(v.at + r * v.line + j * LANES);
        sum[r][j] = sum[r][j] * vj + other[r][j] * gj;
        store(g + c * line, vj);
        store(g + 2 * c * line, gj * vj);
        store(g + 3 * c * line, vj * vj);
    }
    accumulate(rows, VECTORS, k, coefficients + 2 * c * k, k, s.at, s.line, sum);
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < VECTORS; j++)
        store(dv + r * line + j * LANES, sum[r][j]);
}

/* dv [c][n] = g * (rho a S) + v * (e1 S) + e0 S with the three matrices [c][k] one after the other; g is the first
   quarter of `operands`, and the others become v, g * v and v^2. */
static void mix_slopes(long c, long n, long k, const float *coefficients, tile s, tile v, tile operands, float *dv) {
    for (long j = 0; j < n; j += STEP)
        for (long i = 0; i < c; i += ROWS / 2) {
            const float *rows = coefficients + i * k;
            tile s_at = {s.at + j, s.line}, v_at = {v.at + i * v.line + j, v.line};
            tile operands_at = {operands.at + i * operands.line + j, operands.line};
#define SLOPE(R) slope_rows(R, c, k, rows, s_at, v_at, operands_at, dv + i * operands.line + j)
            switch (least(ROWS / 2, c - i)) {
                case 1: SLOPE(1); break;
                case 2: SLOPE(2); break;
#if ROWS > 4
                case 3: SLOPE(3); break;
                case 4: SLOPE(4); break;
#endif
            }
        }
}

INLINE void sums_rows(const int rows, long depth, const float *s, const float *s_dot, long s_line, const float *g,
                      const float *v, const float *v_dot, long line, float *c, long c_line, long table) {
    vec sum[6][SUM_ROWS];
    UNROLL for (int i = 0; i < 6; i++) UNROLL for (int r = 0; r < rows; r++) sum[i][r] = (vec){0};
    for (long p = 0; p < depth; p++, s++, s_dot++, g += line, v += line, v_dot += line) {
        vec gp = load(g), vp = load(v), up = load(v_dot);
        vec gv = gp * vp, gu = gp * up, half_vv = 0.5f * vp * vp, vu = vp * up;
        UNROLL for (int r = 0; r < rows; r++) {
            float a = s[r * s_line], b = s_dot[r * s_line];
            sum[0][r] += a * gp;
            sum[1][r] += a * gv;
            sum[2][r] += b * gp;
            sum[3][r] += b * gv;
            sum[3][r] += a * gu;
            sum[4][r] += b * vp;
            sum[4][r] += a * up;
            sum[5][r] += b * half_vv;
            sum[5][r] += a * vu;
        }
    }
    UNROLL for (int i = 0; i < 6; i++) UNROLL for (int r = 0; r < rows; r++) {
        float *at = c + i * table + r * c_line;
        store(at, load(at) + sum[i][r]);
    }
}

/* Six tables [k][n], one after the other, += sums over pixels of S g, S g v, S' g, (S g v)', (S v)' and (S v^2)' / 2, for
   CM tiles S over S' and PM tiles g, v and v'. */
static void product_sums(long k, long n, long depth, tile s, const float *g, const float *v, const float *v_dot,
                         long line, float *c) {
    const float *dot = s.at + k * s.line;
    for (long j = 0; j < n; j += LANES)
        for (long i = 0; i < k; i += SUM_ROWS) {
#define SUMS(R)                                                                                                        \
    sums_rows(R, depth, s.at + i * s.line, dot + i * s.line, s.line, g + j, v + j, v_dot + j, line, c + i * n + j, n,  \
              k * n)
            switch (least(SUM_ROWS, k - i)) {
                case 1: SUMS(1); break;
#if SUM_ROWS > 1
                case 2: SUMS(2); break;
                case 3: SUMS(3); break;
                case 4: SUMS(4); break;
#endif
            }
        }
}

INLINE void curve_rows(const int rows, long c, long k, const float *coefficients, tile s, tile operands, const float *u,
                       long u_line, float *dv, float *dv_dot, tile out) {
    vec mixed[ROWS][VECTORS], first[ROWS][VECTORS], second[ROWS][VECTORS];
    long line = operands.line, next = 2 * c * k, both = 2 * k; /* a row: what multiplies S, then what multiplies S' */
#define EACH                                                                                                           \
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < VECTORS; j++)
#define AT(r, j) ((r) * line + (j) * LANES)
#define OPERAND(i, r, j) load(operands.at + (i) * c * line + AT(r, j))
    EACH mixed[r][j] = (vec){0};
    accumulate(rows, VECTORS, k, coefficients + k, both, s.at, s.line, mixed); /* rho a S */
    EACH {
        vec g = OPERAND(0, r, j), v = OPERAND(1, r, j), v_dot = OPERAND(4, r, j);
        float *at = operands.at + AT(r, j);
        store(at + 2 * c * line, g * v);
        store(at + 3 * c * line, v * v);
        store(at + 5 * c * line, g * v_dot);
        store(at + 6 * c * line, v * v_dot);
        first[r][j] = mixed[r][j] * v_dot + load(u + r * u_line + j * LANES);
        store(dv + AT(r, j), mixed[r][j] * g);
        mixed[r][j] = (vec){0};
    }
    accumulate(rows, VECTORS, both, coefficients, both, s.at, s.line, mixed); /* (rho a S)' */
    EACH {
        first[r][j] += mixed[r][j] * OPERAND(1, r, j);
        second[r][j] = mixed[r][j] * OPERAND(0, r, j);
    }
    accumulate(rows, VECTORS, both, coefficients + 3 * next, both, s.at, s.line, first); /* (rho b S)' */
    EACH store(out.at + r * out.line + j * LANES, first[r][j]);
    EACH first[r][j] = load(dv + AT(r, j)), mixed[r][j] = (vec){0};
    accumulate(rows, VECTORS, k, coefficients + next + k, both, s.at, s.line, mixed); /* e1 S */
    EACH {
        first[r][j] += mixed[r][j] * OPERAND(1, r, j);
        second[r][j] += mixed[r][j] * OPERAND(4, r, j);
        mixed[r][j] = (vec){0};
    }
    accumulate(rows, VECTORS, k, coefficients + 2 * next + k, both, s.at, s.line, first); /* e0 S */
    EACH store(dv + AT(r, j), first[r][j]);
    accumulate(rows, VECTORS, both, coefficients + next, both, s.at, s.line, mixed); /* (e1 S)' */
    EACH second[r][j] += mixed[r][j] * OPERAND(1, r, j);
    accumulate(rows, VECTORS, both, coefficients + 2 * next, both, s.at, s.line, second); /* (e0 S)' */
    EACH store(dv_dot + AT(r, j), second[r][j]);
#undef EACH
#undef AT
#undef OPERAND
}

/* dv [c][n], its tangent and that of the output, `out`; see `curvatures` for the four matrices [c][2k]. Of the operands g,
   v, g v, v^2, v', g v' and v v' the products are written here. */
static void mix_curves(long c, long n, long k, const float *coefficients, tile s, tile operands, const float *u,
                       long u_line, float *dv, float *dv_dot, tile out) {
    for (long j = 0; j < n; j += STEP)
        for (long i = 0; i < c; i += ROWS / 2) {
            long at = i * operands.line + j;
#define CURVE(R)                                                                                                       \
    curve_rows(R, c, k, coefficients + i * 2 * k, (tile){s.at + j, s.line}, (tile){operands.at + at, operands.line},   \
               u + i * u_line + j, u_line, dv + at, dv_dot + at, (tile){out.at + i * out.line + j, out.line})
            switch (least(ROWS / 2, c - i)) {
                case 1: CURVE(1); break;
                case 2: CURVE(2); break;
#if ROWS > 4
                case 3: CURVE(3); break;
                case 4: CURVE(4); break;
#endif
            }
        }
}

/* ---- Tiles ------------------------------------------------------------------------------------------------------- */

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#if LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

INLINE void interleave(const vec *from, vec *to) {
    UNROLL for (int i = 0; i < LANES / 2; i++) {
        to[2 * i] = SHUFFLE(from[i], from[i + LANES / 2], LOW);
        to[2 * i + 1] = SHUFFLE(from[i], from[i + LANES / 2], HIGH);
    }
}

/* to [columns][rows] = from [rows][columns]; columns are a multiple of LANES, rows are filled up to one with the last. */
static void transpose(const float *from, long from_line, long rows, long columns, float *to, long to_line) {
    for (long i = 0; i < rows; i += LANES)
        for (long j = 0; j < columns; j += LANES) {
            vec p[LANES], q[LANES];
            UNROLL for (int r = 0; r < LANES; r++) p[r] = load(from + least(i + r, rows - 1) * from_line + j);
            interleave(p, q); /* log2(LANES) rounds of the perfect shuffle transpose */
            interleave(q, p);
#if LANES > 4
            interleave(p, q);
#if LANES > 8
            interleave(q, p);
#else
            UNROLL for (int r = 0; r < LANES; r++) p[r] = q[r];
#endif
#endif
            UNROLL for (int r = 0; r < LANES; r++) store(to + (j + r) * to_line + i, p[r]);
        }
}

INLINE vec widen(hvec h) { return (vec)(__builtin_convertvector(h, ivec) << 16); }
INLINE float widen_one(uint16_t h) {
    union { uint32_t bits; float value; } u = {(uint32_t)h << 16};
    return u.value;
}
INLINE hvec narrow(vec v) { /* bfloat16, to nearest even */
    ivec bits = (ivec)v, rounded = bits + (((bits >> 16) & 1) + 0x7fff), nan = (ivec)(v != v);
    return __builtin_convertvector(((rounded & ~nan) | (0x7fc00000 & nan)) >> 16, hvec);
}

/* to [n] = n elements of `from`, float32 or bfloat16, from element `at` on. */
INLINE void read_row(const void *from, int half, long at, long n, float *to) {
    long i = 0;
    if (half) {
        const uint16_t *row = (const uint16_t *)from + at;
        for (; i + LANES <= n; i += LANES) store(to + i, widen(*(const uhvec *)(row + i)));
        for (; i < n; i++) to[i] = widen_one(row[i]);
    } else {
        memcpy(to, (const float *)from + at, (size_t)n * 4);
    }
}
INLINE void write_row(void *to, int half, long at, long n, const float *from) {
    if (half) {
        uint16_t *row = (uint16_t *)to + at;
        long i = 0;
        for (; i + LANES <= n; i += LANES) *(uhvec *)(row + i) = narrow(load(from + i));
        if (i < n) {
            float rest[LANES] = {0};
            memcpy(rest, from + i, (size_t)(n - i) * 4);
            hvec narrowed = narrow(load(rest));
            memcpy(row + i, &narrowed, (size_t)(n - i) * 2);
        }
    } else {
        memcpy((float *)to + at, from, (size_t)n * 4);
    }
}

/* ---- The layer --------------------------------------------------------------------------------------------------- */

/* The arguments, and what follows from them. The first part mirrors the Structure in native.py, field by field. */
typedef struct {
    int64_t images, channels, entities, pixels, filter_images, channels_last, half, threads;
    const void *x, *grad;
    const float *filters, *offset, *value_weight, *value_bias, *weight, *bias, *rho;
    double eps;
    /* Of the backward of the backward: the tangents of x and of the parameters, each NULL for 0 but the first. */
    const void *tangent;
    const float *filters_dot, *offset_dot, *value_weight_dot, *weight_dot, *bias_dot, *rho_dot;
    void *out; /* forward: the output; else dx */
    float *area, *mean, *rstd;
    float *dfilters, *doffset, *dvalue_weight, *dweight, *dbias, *drho;
    void *dgrad;
    float *dfilters_dot, *doffset_dot; /* gradients of the tangents of filters and offset */
    float *workspace;
    void (*team)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel of torch's OpenMP, or NULL */
    /* Derived. */
    long block, line, wide, wide_line; /* pixels of a block; lines of CM and PM tiles; C in whole vectors */
    long segments, shares;             /* parts of one image; parts of the work, of one thread each */
    int keep;                          /* whether v and S of pass 1 are kept for pass 2 */
    float *kept_layout, *kept_value;   /* kept_value: NULL where the output is its place meanwhile */
    long tables;                       /* of sums over pixels: 2, or 6 */
    float *sums, *area_sums;           /* [N * segments][tables][K][wide], [N * segments][K] */
    float *stacked;                    /* backward, pass 2: what it multiplies by, of every image */
    long stacked_size;
    float *filter_sums, *row_sums;     /* backward, pass 2: [N * segments][order][K][wide], [N * segments][order][K] */
    float *weight_sums;                /* backward, pass 2: [shares][C][wide] */
    float *scratch;
    long scratch_size; /* of one share, in floats */
    int order; /* 0: forward, 1: backward, 2: backward of the backward */
} layer;

/* What one share works with. */
typedef struct {
    float *centre, *shift;     /* of the image: xs [C], and W xs + bias [C] */
    float *start;              /* [K]: the logits at xs */
    float *rows;               /* [C + K][C]: W over the filters times log2(e) */
    float *turned;             /* backward: [C][C + K], the transpose of W over the filters */
    float *coefficients;       /* forward: [2C][K], rho a over rho b */
    float *x, *x_pm;           /* x - xs: [wide][line], [block][wide_line] */
    float *value, *layout;     /* v [C][line] and S [K][line] */
    float *value_pm, *grad_pm; /* [block][wide_line] */
    float *operands;           /* backward: g, v, g * v, v^2, [4C][line] */
    float *slopes;             /* backward: dv over draw, [C + K][line] */
    /* Of the backward of the backward; there operands has 7C rows, turned [C][2C + 2K] and slopes 2C + 2K rows: dv', draw',
       draw, dv. S' stands below S, and v and v' among the operands. */
    float *start_dot, *rows_dot; /* as start and rows, of the tangents */
    float *u, *u_pm, *out;       /* x', and the tangent of the output: [wide][line], [block][wide_line], [wide][line] */
    float *value_dot_pm;         /* [block][wide_line] */
} tiles;

static float *take(float **cursor, long count) {
    float *taken = *cursor;
    *cursor += up(count, 16);
    return taken;
}

static tiles divide(const layer *l, float *scratch, long *size) {
    long c = l->channels, k = l->entities, line = l->line;
    float *cursor = scratch;
    tiles t = {0};
    t.centre = take(&cursor, l->wide);
    t.shift = take(&cursor, c);
    t.start = take(&cursor, k);
    t.rows = take(&cursor, (c + k) * c);
    t.x = take(&cursor, l->wide * line);
    t.x_pm = take(&cursor, l->block * l->wide_line);
    t.value_pm = take(&cursor, l->block * l->wide_line);
    if (l->order) {
        long times = l->order;
        t.turned = take(&cursor, times * c * (c + k));
        t.grad_pm = take(&cursor, l->block * l->wide_line);
        t.operands = take(&cursor, ((times == 1 ? 4 : 7) * c + LANES) * line);
        t.slopes = take(&cursor, times * (c + k) * line);
    } else {
        t.coefficients = take(&cursor, 2 * c * k);
    }
    if (l->order == 2) {
        t.start_dot = take(&cursor, k);
        t.rows_dot = take(&cursor, (c + k) * c);
        t.u = take(&cursor, l->wide * line);
        t.u_pm = take(&cursor, l->block * l->wide_line);
        t.out = take(&cursor, l->wide * line);
        t.value_dot_pm = take(&cursor, l->block * l->wide_line);
        t.value = t.operands + c * line;
        t.layout = take(&cursor, 2 * k * line);
    } else {
        t.value = take(&cursor, c * line);
        t.layout = take(&cursor, k * line);
    }
    if (size) *size = (long)(cursor - scratch);
    return t;
}

/* Everything that follows from the arguments; returns the floats of workspace that they need. */
static long plan(layer *l) {
    long n = l->images, c = l->channels, k = l->entities, p = l->pixels;
    l->wide = up(c, LANES);
    l->wide_line = l->wide + (l->wide % 64 ? 0 : LANES); /* no line a multiple of 256 bytes: rows would share cache sets */

    /* Threads are worth their start from about 10 microseconds of work on. */
    double work = (double)n * p * c * (c + 5 * k) * (l->order == 2 ? 10 : l->order ? 4 : 1);
    long shares = work < 1e6 ? 1 : least(l->threads, MAX_SHARES);
    l->segments = n % shares ? shares : 1; /* whole images where they share out evenly, else equal parts of each */
    l->shares = shares;

    long per_pixel = 4 * (l->order == 2 ? 17 * c + 4 * k : l->order ? 12 * c + 3 * k : 5 * c + k);
    long block = 512 * 1024 / per_pixel / STEP * STEP;
    block = block < 2 * STEP ? 2 * STEP : least(block, 512);
    l->block = least(block, up(p, STEP));
    l->line = l->block + LANES;

    int small = l->segments == 1 && (c + k) * p <= 384 * 1024;
    l->keep = small || (!l->half && c >= 48 && 2 * k <= c);
    if (l->order == 2 && l->half) l->keep = 0; /* v and v' are kept where dgrad and dx will be */
    l->tables = l->order == 2 ? 6 : 2;
    l->stacked_size = l->order == 2 ? 19 * c * k + 2 * k : 7 * c * k + k;

    float *cursor = l->workspace;
    long units = n * l->segments;
    l->sums = take(&cursor, units * l->tables * k * l->wide);
    l->area_sums = take(&cursor, units * k);
    if (l->order) {
        l->stacked = take(&cursor, n * l->stacked_size);
        l->filter_sums = take(&cursor, units * l->order * k * l->wide);
        l->row_sums = take(&cursor, units * l->order * k);
        l->weight_sums = take(&cursor, shares * c * l->wide);
    }
    long images_at_once = l->segments == 1 ? shares : n;
    l->kept_layout = l->keep ? take(&cursor, images_at_once * (l->order == 2 ? 2 : 1) * k * p) : NULL;
    l->kept_value = l->keep && l->half ? take(&cursor, images_at_once * c * p) : NULL;
    divide(l, cursor, &l->scratch_size);
    l->scratch = take(&cursor, shares * l->scratch_size);
    return (long)(cursor - l->workspace);
}

int64_t attnorm_workspace(layer *l, int order) {
    l->order = order;
    l->workspace = NULL;
    return plan(l) + 16;
}

static void prepare(layer *l, int order) {
    l->order = order;
    l->workspace = (float *)(((uintptr_t)l->workspace + 63) & ~(uintptr_t)63);
    plan(l);
}

/* Element of pixel 0 of a row of a CM block, or of a pixel. */
INLINE long row_at(const layer *l, long image, long channel, long pixel) {
    return (image * l->channels + channel) * l->pixels + pixel;
}

/* A block of a feature map as CM and PM tiles (each may be NULL unless the other is made of it), minus `centre` if
   given. The CM tile is 0 past the last of `count` pixels, to the next multiple of STEP. */
static void read_block(const layer *l, const void *from, long image, long pixel, long count, const float *centre,
                       float *cm, float *pm, int want_cm, int want_pm) {
    long c = l->channels, padded = up(count, STEP), line = l->line, wide_line = l->wide_line;
    if (l->channels_last) {
        for (long i = 0; i < count; i++) {
            float *row = pm + i * wide_line;
            read_row(from, (int)l->half, (image * l->pixels + pixel + i) * c, c, row);
            if (centre)
                for (long j = 0; j < c; j += LANES) store(row + j, load(row + j) - load(centre + j));
        }
        for (long i = count; i < padded; i++) memset(pm + i * wide_line, 0, (size_t)l->wide * 4);
        if (want_cm) transpose(pm, wide_line, padded, l->wide, cm, line);
    } else {
        for (long i = 0; i < c; i++) {
            float *row = cm + i * line;
            if (!l->half && centre && count == padded) {
                const float *at = (const float *)from + row_at(l, image, i, pixel);
                float mid = centre[i];
                for (long j = 0; j < count; j += LANES) store(row + j, load(at + j) - mid);
                continue;
            }
            read_row(from, (int)l->half, row_at(l, image, i, pixel), count, row);
            for (long j = count; j < padded; j++) row[j] = centre ? centre[i] : 0;
            if (centre)
                for (long j = 0; j < padded; j += LANES) store(row + j, load(row + j) - centre[i]);
        }
        if (want_pm) transpose(cm, line, c, padded, pm, wide_line);
    }
}

/* The block `cm` (plus that of `residual` if given) into the map `into`; `cm` is spoilt. */
static void write_block(const layer *l, long image, long pixel, long count, float *cm, float *pm, const void *residual,
                        void *into) {
    long c = l->channels, padded = up(count, STEP), line = l->line, wide_line = l->wide_line;
    if (l->channels_last) transpose(cm, line, c, padded, pm, wide_line);
    long rows = l->channels_last ? count : c, length = l->channels_last ? c : count;
    for (long i = 0; i < rows; i++) {
        long at = l->channels_last ? (image * l->pixels + pixel + i) * c : row_at(l, image, i, pixel);
        float *row = l->channels_last ? pm + i * wide_line : cm + i * line;
        if (!residual) {
            write_row(into, (int)l->half, at, length, row);
        } else if (l->half) {
            const uint16_t *x = (const uint16_t *)residual + at;
            long j = 0;
            for (; j + LANES <= length; j += LANES) store(row + j, load(row + j) + widen(*(const uhvec *)(x + j)));
            for (; j < length; j++) row[j] += widen_one(x[j]);
            write_row(into, 1, at, length, row);
        } else {
            const float *x = (const float *)residual + at;
            float *to = (float *)into + at;
            long j = 0;
            for (; j + LANES <= length; j += LANES) store(to + j, load(row + j) + load(x + j));
            for (; j < length; j++) to[j] = row[j] + x[j];
        }
    }
}

/* Where v and S of a block are: whole blocks that are kept stand where they are kept, and others in tiles. */
static void places(const layer *l, const tiles *t, long image, long share, long pixel, long count, tile *value,
                   tile *layout) {
    long c = l->channels, k = l->entities, p = l->pixels, slot = l->segments == 1 ? share : image;
    *value = (tile){t->value, l->line};
    *layout = (tile){t->layout, l->line};
    if (!l->keep || count % STEP) return;
    *layout = (tile){l->kept_layout + slot * k * p + pixel * k, count};
    if (l->kept_value) {
        *value = (tile){l->kept_value + slot * c * p + pixel * c, count};
    } else if (l->channels_last) {
        *value = (tile){(float *)l->out + (image * p + pixel) * c, count};
    } else {
        *value = (tile){(float *)l->out + row_at(l, image, 0, pixel), p};
    }
}

/* S from logits in base 2, in place; 0 past the last pixel. */
static void softmax_block(long k, tile layout, long count) {
    float *logits = layout.at;
    long line = layout.line, padded = up(count, STEP);
    for (long j = 0; j < padded; j += STEP) {
        vec most[VECTORS], sum[VECTORS];
        UNROLL for (int u = 0; u < VECTORS; u++) most[u] = load(logits + j + u * LANES), sum[u] = (vec){0};
        for (long i = 1; i < k; i++)
            UNROLL for (int u = 0; u < VECTORS; u++) {
                vec logit = load(logits + i * line + j + u * LANES);
                most[u] = larger(logit, most[u]);
            }
        for (long i = 0; i < k; i++)
            UNROLL for (int u = 0; u < VECTORS; u++) {
                float *at = logits + i * line + j + u * LANES;
                vec e = exp2_vec(load(at) - most[u]);
                sum[u] += e;
                store(at, e);
            }
        UNROLL for (int u = 0; u < VECTORS; u++) sum[u] = 1.0f / sum[u];
        for (long i = 0; i < k; i++)
            UNROLL for (int u = 0; u < VECTORS; u++) {
                float *at = logits + i * line + j + u * LANES;
                store(at, load(at) * sum[u]);
            }
    }
    for (long i = 0; i < k; i++) memset(logits + i * line + count, 0, (size_t)(padded - count) * 4);
}

static void add_rows(const float *cm, long line, long rows, long padded, float *sums) {
    for (long i = 0; i < rows; i++) {
        vec sum[VECTORS] = {0};
        for (long j = 0; j < padded; j += STEP)
            UNROLL for (int u = 0; u < VECTORS; u++) sum[u] += load(cm + i * line + j + u * LANES);
        vec total = sum[0];
        UNROLL for (int u = 1; u < VECTORS; u++) total += sum[u];
        sums[i] += sum_lanes(total);
    }
}

static float dot(const float *a, const float *b, long n) {
    vec sum = {0};
    long i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(a + i) * load(b + i);
    float total = sum_lanes(sum);
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

/* The same for the tangents. The tangent of v's shift is left out: it drops out of Eq. 5 like the shift. */
static void enter_image_of_tangents(const layer *l, const tiles *t, long own, int first) {
    const double log2_e = 1.4426950408889634;
    long c = l->channels, k = l->entities, width = 2 * (c + k);
    float scale = (float)log2_e;
    for (long i = 0; i < k; i++) {
        const float *filter = l->filters_dot ? l->filters_dot + (own * k + i) * c : NULL;
        double at_centre = l->offset_dot ? l->offset_dot[own * k + i] : 0;
        for (long j = 0; j < c; j++) {
            float value = filter ? filter[j] : 0;
            at_centre += (double)value * t->centre[j];
            t->rows_dot[(c + i) * c + j] = scale * value;
            t->turned[j * width + c + k + i] = value;
        }
        t->start_dot[i] = (float)(at_centre * log2_e);
    }
    if (!first) return;
    for (long i = 0; i < c; i++)
        for (long j = 0; j < c; j++) {
            float value = l->value_weight_dot ? l->value_weight_dot[i * c + j] : 0;
            t->rows_dot[i * c + j] = value;
            t->turned[j * width + c + 2 * k + i] = value;
        }
}

/* What depends on the image alone: the centre of x, the shift of v, filters and offset of the logits. */
static void enter_image(const layer *l, const tiles *t, long image, int first) {
    const double log2_e = 1.4426950408889634;
    long c = l->channels, k = l->entities, p = l->pixels, own = l->filter_images > 1 ? image : 0;
    const float *filters = l->filters + own * k * c, *offset = l->offset + own * k;
    float scale = (float)log2_e;

    for (long i = 0; i < c; i++) t->centre[i] = 0;
    long runs = p <= SAMPLES * SAMPLES ? 1 : SAMPLES, length = runs == 1 ? p : SAMPLES;
    for (long run = 0; run < runs; run++) {
        long start = runs == 1 ? 0 : run * (p - length) / (runs - 1);
        for (long j = 0; j < length; j += SAMPLES) {
            long part = least(SAMPLES, length - j), rows = l->channels_last ? part : c;
            for (long i = 0; i < rows; i++) {
                if (l->channels_last) {
                    float *row = t->x_pm;
                    read_row(l->x, (int)l->half, (image * p + start + j + i) * c, c, row);
                    for (long q = 0; q < c; q++) t->centre[q] += row[q];
                } else {
                    float row[SAMPLES] = {0}, sum = 0;
                    read_row(l->x, (int)l->half, row_at(l, image, i, start + j), part, row);
                    for (long q = 0; q < SAMPLES; q++) sum += row[q];
                    t->centre[i] += sum;
                }
            }
        }
    }
    for (long i = 0; i < c; i++) {
        float centre = t->centre[i] / (float)(runs * length);
        t->centre[i] = fabsf(centre) <= 1e30f ? centre : 0; /* an infinity must not spread beyond its own pixel's sums */
    }
    for (long i = c; i < l->wide; i++) t->centre[i] = 0;

    for (long i = 0; i < c; i++) {
        t->shift[i] = dot(l->value_weight + i * c, t->centre, c) + l->value_bias[i];
    }
    for (long i = 0; i < k; i++) {
        double at_centre = offset[i];
        for (long j = 0; j < c; j++) at_centre += (double)filters[i * c + j] * t->centre[j];
        t->start[i] = (float)(at_centre * log2_e);
    }
    if (first) memcpy(t->rows, l->value_weight, (size_t)(c * c) * 4);
    if (first || own) {
        for (long i = 0; i < k * c; i++) t->rows[c * c + i] = scale * filters[i];
    }
    if (l->order && (first || own)) {
        long width = l->order * (c + k);
        for (long i = 0; i < c; i++) {
            float *row = t->turned + i * width;
            if (first)
                for (long j = 0; j < c; j++) row[j] = l->value_weight[j * c + i];
            for (long j = 0; j < k; j++) row[c + j] = filters[j * c + i];
        }
    }
    if (l->order == 2) enter_image_of_tangents(l, t, own, first);
}

/* v and S of the block whose x - xs is in t->x. */
static void value_and_layout(const layer *l, const tiles *t, long count, tile value, tile layout) {
    long c = l->channels, k = l->entities, padded = up(count, STEP);
    product(c, padded, c, t->rows, c, t->x, l->line, NULL, NULL, 0, value.at, value.line);
    product(k, padded, c, t->rows + c * c, c, t->x, l->line, t->start, NULL, 0, layout.at, layout.line);
    softmax_block(k, layout, count);
}

/* Pass 1 over pixels [from, to): forward, the sums of S, S v and S v^2; backward, those of S g and S g v. */
static void first_pass(const layer *l, const tiles *t, long share, long image, long unit, long from, long to) {
    long k = l->entities, wide = l->wide;
    float *sums = l->sums + unit * l->tables * k * wide, *area = l->area_sums + unit * k;
    memset(sums, 0, (size_t)(2 * k * wide) * 4);
    memset(area, 0, (size_t)k * 4);
    for (long pixel = from; pixel < to; pixel += l->block) {
        long count = least(l->block, to - pixel), padded = up(count, STEP);
        tile value, layout;
        places(l, t, image, share, pixel, count, &value, &layout);
        read_block(l, l->x, image, pixel, count, t->centre, t->x, t->x_pm, 1, 0);
        value_and_layout(l, t, count, value, layout);
        transpose(value.at, value.line, l->channels, padded, t->value_pm, l->wide_line);
        const float *factor = t->value_pm;
        if (l->order) {
            read_block(l, l->grad, image, pixel, count, NULL, t->x, t->grad_pm, 0, 1);
            factor = t->grad_pm;
        } else {
            add_rows(layout.at, layout.line, k, padded, area);
        }
        product_pair(k, wide, count, layout.at, layout.line, factor, t->value_pm, l->wide_line, sums, sums + k * wide,
                     wide);
    }
}

/* The sums of an image's segments, into the first one's. */
static void merge(const layer *l, long image, float *sums, long size) {
    sums += image * l->segments * size;
    for (long s = 1; s < l->segments; s++)
        for (long i = 0; i < size; i++) sums[i] += sums[s * size + i];
}

static void moments(const layer *l, const tiles *t, long image) {
    long c = l->channels, k = l->entities, wide = l->wide;
    const float *first = l->sums + image * l->segments * l->tables * k * wide, *second = first + k * wide;
    const float *areas = l->area_sums + image * l->segments * k;
    for (long i = 0; i < k; i++) {
        float area = areas[i] < SMALLEST_AREA ? SMALLEST_AREA : areas[i]; /* NaN stays */
        float share = areas[i] / area; /* 1, or less where the area is clamped */
        l->area[image * k + i] = area;
        for (long j = 0; j < c; j++) {
            long at = (image * k + i) * c + j;
            float mean = first[i * wide + j] / area;
            float var = second[i * wide + j] / area;
            if (share < 1) {
                float whole = mean - (1 - share) * t->shift[j]; /* the contract's mean, about the shift */
                var = var - 2 * whole * mean + whole * whole * share;
                mean = whole;
            } else {
                var -= mean * mean;
            }
            var = var < 0 ? 0 : var;
            l->mean[at] = mean + t->shift[j];
            l->rstd[at] = 1 / sqrtf(var + (float)l->eps);
        }
    }
}

/* rho a over rho b of out = v (sum_i rho a_i S_i) + sum_i rho b_i S_i + x, with b about the shift. */
static void mixing(const layer *l, const tiles *t, long image) {
    long c = l->channels, k = l->entities;
    float rho = *l->rho;
    for (long i = 0; i < k; i++)
        for (long j = 0; j < c; j++) {
            long at = (image * k + i) * c + j;
            float a = l->weight[i * c + j] * l->rstd[at];
            t->coefficients[j * k + i] = rho * a;
            t->coefficients[(c + j) * k + i] = rho * (l->bias[i * c + j] - a * (l->mean[at] - t->shift[j]));
        }
}

static void second_pass_forward(const layer *l, const tiles *t, long share, long image, long from, long to) {
    long c = l->channels, k = l->entities;
    for (long pixel = from; pixel < to; pixel += l->block) {
        long count = least(l->block, to - pixel), padded = up(count, STEP);
        tile value, layout;
        places(l, t, image, share, pixel, count, &value, &layout);
        if (!l->keep || count != padded) {
            read_block(l, l->x, image, pixel, count, t->centre, t->x, t->x_pm, 1, 0);
            value_and_layout(l, t, count, value, layout);
        }
        if (count == padded && !l->channels_last && !l->half) {
            long at = row_at(l, image, 0, pixel);
            tile out = {(float *)l->out + at, l->pixels};
            mix(c, padded, k, t->coefficients, layout, value, (const float *)l->x + at, l->pixels, out);
        } else {
            mix(c, padded, k, t->coefficients, layout, value, NULL, 0, (tile){t->x, l->line});
            write_block(l, image, pixel, count, t->x, t->x_pm, l->x, l->out);
        }
    }
}

/* Of one image, from the sums of pass 1: its part of the parameters' gradients, in place of the sums, and what pass 2
   multiplies by. The sums are taken about the shift, so every mean here is, too. */
static float slopes_of_moments(const layer *l, const tiles *t, long image) {
    long c = l->channels, k = l->entities, wide = l->wide;
    float *b_sums = l->sums + image * l->segments * l->tables * k * wide, *a_sums = b_sums + k * wide;
    float *stacked = l->stacked + image * l->stacked_size, *mixing = stacked + 4 * c * k, *start = mixing + 3 * c * k;
    float rho = *l->rho;
    double drho = 0;
    for (long i = 0; i < k; i++) {
        double constant = 0;
        float area = l->area[image * k + i], *of_slope = stacked + i * 4 * c;
        for (long j = 0; j < c; j++) {
            long at = (image * k + i) * c + j;
            float rstd = l->rstd[at], mean = l->mean[at] - t->shift[j], weight = l->weight[i * c + j];
            float a = weight * rstd, b = l->bias[i * c + j] - a * mean;
            float g_sum = a_sums[i * wide + j] - mean * b_sums[i * wide + j], db = rho * b_sums[i * wide + j];
            float var = 1 / (rstd * rstd) - (float)l->eps;
            float dvar = -0.5f * rstd * rstd * rstd * weight * rho * g_sum, dmean = -a * db;
            drho += (double)a * a_sums[i * wide + j] + (double)b * b_sums[i * wide + j];
            float e0 = (dmean - 2 * dvar * mean) / area;
            constant += -dmean * mean + dvar * (mean * mean - (var > 0 ? var : 0));
            of_slope[j] = rho * b;
            of_slope[c + j] = e0;
            of_slope[2 * c + j] = rho * a;
            of_slope[3 * c + j] = dvar / area;
            mixing[j * k + i] = rho * a;
            mixing[(c + j) * k + i] = 2 * dvar / area;
            mixing[(2 * c + j) * k + i] = e0;
            a_sums[i * wide + j] = rstd * rho * g_sum; /* dweight */
            b_sums[i * wide + j] = db;                 /* dbias */
        }
        start[i] = (float)(constant / area);
    }
    return (float)drho;
}

static void second_pass_backward(const layer *l, const tiles *t, long share, long image, long unit, long from, long to) {
    long c = l->channels, k = l->entities, line = l->line, wide = l->wide;
    const float *stacked = l->stacked + image * l->stacked_size, *mixing = stacked + 4 * c * k;
    const float *start = mixing + 3 * c * k;
    float *g = t->operands;
    float *dv = t->slopes, *draw = dv + c * line;
    float *weight_sums = l->weight_sums + share * c * wide;
    float *filter_sums = l->filter_sums + unit * k * wide, *row_sums = l->row_sums + unit * k;
    memset(filter_sums, 0, (size_t)(k * wide) * 4);
    memset(row_sums, 0, (size_t)k * 4);
    for (long pixel = from; pixel < to; pixel += l->block) {
        long count = least(l->block, to - pixel), padded = up(count, STEP);
        tile value, layout;
        places(l, t, image, share, pixel, count, &value, &layout);
        read_block(l, l->grad, image, pixel, count, NULL, g, t->grad_pm, 1, 0);
        read_block(l, l->x, image, pixel, count, t->centre, t->x, t->x_pm, 1, 1);
        if (!l->keep || count != padded) value_and_layout(l, t, count, value, layout);
        mix_slopes(c, padded, k, mixing, layout, value, (tile){g, line}, dv);
        product(k, padded, 4 * c, stacked, 4 * c, g, line, start, NULL, 0, draw, line);
        for (long j = 0; j < padded; j += LANES) {
            const float *s = layout.at + j;
            vec common = {0};
            for (long i = 0; i < k; i++) common += load(s + i * layout.line) * load(draw + i * line + j);
            for (long i = 0; i < k; i++)
                store(draw + i * line + j, load(s + i * layout.line) * (load(draw + i * line + j) - common));
        }
        add_rows(draw, line, k, padded, row_sums);
        product(c, wide, count, dv, line, t->x_pm, l->wide_line, NULL, weight_sums, wide, weight_sums, wide);
        product(k, wide, count, draw, line, t->x_pm, l->wide_line, NULL, filter_sums, wide, filter_sums, wide);
        int direct = count == padded && !l->channels_last && !l->half;
        tile dx = direct ? (tile){(float *)l->out + row_at(l, image, 0, pixel), l->pixels} : (tile){g, line};
        product(c, padded, c + k, t->turned, c + k, dv, line, NULL, g, line, dx.at, dx.line);
        if (!direct) write_block(l, image, pixel, count, g, t->grad_pm, NULL, l->out);
    }
    /* x was centred: put its centre back. Not so for the value projection: v's shift drops out of Eq. 5, so that dv sums
       to 0 over an image, and the centre would multiply what rounding leaves of it. */
    for (long i = 0; i < k; i++)
        for (long j = 0; j < c; j++) filter_sums[i * wide + j] += row_sums[i] * t->centre[j];
}

/* ---- The backward of the backward --------------------------------------------------------------------------------

   For cotangents x', ... of the gradients dx, ... the sum <x', dx> + ... is <g, out'>, with out' the tangent of the output
   where x and the parameters move along x', ...: so its gradient by g is out', and its gradient by x is the tangent of
   dx. Every name with a prime or `dot` is the tangent of what has the name without. */

/* Where S over S', v and v' of a whole block are kept between the passes. */
typedef struct {
    tile layout, v, v_dot;
    int is_kept;
} places_of_tangents;

static places_of_tangents where_tangents_are(const layer *l, const tiles *t, long share, long image, long pixel,
                                             long count) {
    long c = l->channels, k = l->entities, p = l->pixels, slot = l->segments == 1 ? share : image;
    if (!l->keep || count % STEP) return (places_of_tangents){.layout = {t->layout, l->line}};
    long at = l->channels_last ? (image * p + pixel) * c : row_at(l, image, 0, pixel);
    long line = l->channels_last ? count : p;
    tile layout = {l->kept_layout + (slot * p + pixel) * 2 * k, count};
    return (places_of_tangents){layout, {(float *)l->dgrad + at, line}, {(float *)l->out + at, line}, 1};
}

static void copy_rows(tile from, tile to, long rows, long count) {
    for (long i = 0; i < rows; i++) memcpy(to.at + i * to.line, from.at + i * from.line, (size_t)count * 4);
}

/* v and v' among the operands, and S over S', of the block whose x - xs is in t->x and whose x' is in t->u. */
static void value_layout_and_tangents(const layer *l, const tiles *t, long count, tile layout) {
    const float ln_2 = 0.69314718f;
    long c = l->channels, k = l->entities, line = l->line, s_line = layout.line, padded = up(count, STEP);
    float *v_dot = t->operands + 4 * c * line, *dot = layout.at + k * s_line;
    value_and_layout(l, t, count, (tile){t->value, line}, layout);
    product(c, padded, c, t->rows, c, t->u, line, NULL, NULL, 0, v_dot, line);
    product(k, padded, c, t->rows + c * c, c, t->u, line, t->start_dot, NULL, 0, dot, s_line);
    if (l->value_weight_dot) product(c, padded, c, t->rows_dot, c, t->x, line, NULL, v_dot, line, v_dot, line);
    if (l->filters_dot) product(k, padded, c, t->rows_dot + c * c, c, t->x, line, NULL, dot, s_line, dot, s_line);
    for (long j = 0; j < padded; j += LANES) {
        const float *s = layout.at + j;
        vec common = {0};
        for (long i = 0; i < k; i++) common += load(s + i * s_line) * load(dot + i * s_line + j);
        for (long i = 0; i < k; i++)
            store(dot + i * s_line + j, ln_2 * load(s + i * s_line) * (load(dot + i * s_line + j) - common));
    }
}

/* Pass 1 over pixels [from, to): the sums of `product_sums`, and those of S'. */
static void first_pass_of_tangents(const layer *l, const tiles *t, long share, long image, long unit, long from,
                                   long to) {
    long c = l->channels, k = l->entities, line = l->line, wide_line = l->wide_line;
    float *sums = l->sums + unit * 6 * k * l->wide, *area = l->area_sums + unit * k;
    memset(sums, 0, (size_t)(6 * k * l->wide) * 4);
    memset(area, 0, (size_t)k * 4);
    for (long pixel = from; pixel < to; pixel += l->block) {
        long count = least(l->block, to - pixel), padded = up(count, STEP);
        read_block(l, l->grad, image, pixel, count, NULL, t->out, t->grad_pm, 0, 1);
        read_block(l, l->x, image, pixel, count, t->centre, t->x, t->x_pm, 1, 0);
        read_block(l, l->tangent, image, pixel, count, NULL, t->u, t->u_pm, 1, 0);
        places_of_tangents at = where_tangents_are(l, t, share, image, pixel, count);
        tile v = {t->value, line}, v_dot = {t->operands + 4 * c * line, line};
        value_layout_and_tangents(l, t, count, at.layout);
        transpose(v.at, line, c, padded, t->value_pm, wide_line);
        transpose(v_dot.at, line, c, padded, t->value_dot_pm, wide_line);
        if (at.is_kept) copy_rows(v, at.v, c, count);
        if (at.is_kept) copy_rows(v_dot, at.v_dot, c, count);
        add_rows(at.layout.at + k * at.layout.line, at.layout.line, k, padded, area);
        product_sums(k, l->wide, count, at.layout, t->grad_pm, t->value_pm, t->value_dot_pm, wide_line,
                     sums);
    }
}

/* As slopes_of_moments, with the tangents of all that it finds. For the second pass: dv = g (rho a S) + v (e1 S) + e0 S,
   and dS is the stacked product of [4C] with (g, v, g v, v^2); dS' that of [7C] with all operands. */
static float curvatures(const layer *l, const tiles *t, long image) {
    long c = l->channels, k = l->entities, table = k * l->wide;
    float *sums = l->sums + image * l->segments * 6 * table;
    const float *areas_dot = l->area_sums + image * l->segments * k;
    float *stacked = l->stacked + image * l->stacked_size, *stacked_dot = stacked + 4 * c * k;
    float *mixing = stacked_dot + 7 * c * k, *start = mixing + 8 * c * k;
    float rho = *l->rho, rho_dot = l->rho_dot ? *l->rho_dot : 0;
    double drho = 0;
    for (long i = 0; i < k; i++) {
        float area = l->area[image * k + i], growth = areas_dot[i] / area;
        float *of_slope = stacked + i * 4 * c, *of_dot = stacked_dot + i * 7 * c;
        double constant = 0, constant_dot = 0;
        for (long j = 0; j < c; j++) {
            long at = (image * k + i) * c + j;
            float *sum = sums + i * l->wide + j;
            float g = sum[0], gv = sum[table], g_dot = sum[2 * table], gv_dot = sum[3 * table];
            float v_dot = sum[4 * table], half_square_dot = sum[5 * table];
            float rstd = l->rstd[at], mean = l->mean[at] - t->shift[j];
            float beta = l->weight[i * c + j], alpha = l->bias[i * c + j];
            float beta_dot = l->weight_dot ? l->weight_dot[i * c + j] : 0;
            float alpha_dot = l->bias_dot ? l->bias_dot[i * c + j] : 0;
            float var = 1 / (rstd * rstd) - (float)l->eps;
            var = var > 0 ? var : 0;

            float mean_dot = v_dot / area - mean * growth;
            float var_dot = 2 * (half_square_dot - mean * v_dot) / area + (mean * mean - var) * growth;
            float cube = rstd * rstd * rstd, rstd_dot = -0.5f * cube * var_dot;
            float a = beta * rstd, a_dot = beta_dot * rstd + beta * rstd_dot;
            float b = alpha - a * mean, b_dot = alpha_dot - a_dot * mean - a * mean_dot;
            float centred = gv - mean * g, centred_dot = gv_dot - mean_dot * g - mean * g_dot;
            float drstd = rho * beta * centred;
            float drstd_dot = rho_dot * beta * centred + rho * (beta_dot * centred + beta * centred_dot);
            float dvar = -0.5f * cube * drstd;
            float dvar_dot = -1.5f * rstd * rstd * rstd_dot * drstd - 0.5f * cube * drstd_dot;
            float dmean = -rho * a * g, dmean_dot = -rho_dot * a * g - rho * (a_dot * g + a * g_dot);
            float e1 = 2 * dvar / area, e1_dot = 2 * dvar_dot / area - e1 * growth;
            float e0 = (dmean - 2 * dvar * mean) / area;
            float e0_dot = (dmean_dot - 2 * (dvar_dot * mean + dvar * mean_dot)) / area - e0 * growth;
            constant += dvar * (mean * mean - var) - dmean * mean;
            constant_dot += dvar_dot * (mean * mean - var) + dvar * (2 * mean * mean_dot - var_dot) -
                            dmean_dot * mean - dmean * mean_dot;
            drho += (double)a_dot * centred + (double)a * centred_dot + (double)alpha_dot * g + (double)alpha * g_dot;

            float rho_a = rho * a, rho_a_dot = rho_dot * a + rho * a_dot;
            float rho_b = rho * b, rho_b_dot = rho_dot * b + rho * b_dot;
            of_slope[j] = rho_b;
            of_slope[c + j] = e0;
            of_slope[2 * c + j] = rho_a;
            of_slope[3 * c + j] = e1 / 2;
            of_dot[j] = rho_b_dot;
            of_dot[c + j] = e0_dot;
            of_dot[2 * c + j] = rho_a_dot;
            of_dot[3 * c + j] = e1_dot / 2;
            of_dot[4 * c + j] = e0;
            of_dot[5 * c + j] = rho_a;
            of_dot[6 * c + j] = e1;
            float *row = mixing + j * 2 * k + i;
            row[0] = rho_a_dot;
            row[k] = rho_a;
            row[2 * c * k] = e1_dot;
            row[2 * c * k + k] = e1;
            row[4 * c * k] = e0_dot;
            row[4 * c * k + k] = e0;
            row[6 * c * k] = rho_b_dot;
            row[6 * c * k + k] = rho_b;
            sum[0] = rho_dot * g + rho * g_dot; /* dbias */
            sum[table] = rho_dot * rstd * centred + rho * (rstd_dot * centred + rstd * centred_dot); /* dweight */
        }
        start[i] = (float)(constant / area);
        start[k + i] = (float)(constant_dot / area - constant / area * growth);
    }
    return (float)drho;
}

static void second_pass_of_tangents(const layer *l, const tiles *t, long share, long image, long unit, long from,
                                    long to) {
    long c = l->channels, k = l->entities, line = l->line, wide = l->wide, wide_line = l->wide_line;
    const float *stacked = l->stacked + image * l->stacked_size, *stacked_dot = stacked + 4 * c * k;
    const float *mixing = stacked_dot + 7 * c * k, *start = mixing + 8 * c * k;
    float *g = t->operands, *dv_dot = t->slopes, *draw_dot = dv_dot + c * line, *draw = draw_dot + k * line;
    float *dv = draw + k * line;
    float *weight_sums = l->weight_sums + share * c * wide, *filter_sums = l->filter_sums + unit * 2 * k * wide;
    float *first_sums = filter_sums + k * wide, *row_sums = l->row_sums + unit * 2 * k;
    memset(filter_sums, 0, (size_t)(2 * k * wide) * 4);
    memset(row_sums, 0, (size_t)(2 * k) * 4);
    long depth = c + k + (l->value_weight_dot ? k + c : l->filters_dot ? k : 0);
    for (long pixel = from; pixel < to; pixel += l->block) {
        long count = least(l->block, to - pixel), padded = up(count, STEP);
        read_block(l, l->grad, image, pixel, count, NULL, g, t->grad_pm, 1, 0);
        read_block(l, l->x, image, pixel, count, t->centre, t->x, t->x_pm, 1, 1);
        read_block(l, l->tangent, image, pixel, count, NULL, t->u, t->u_pm, 1, 1);
        places_of_tangents kept = where_tangents_are(l, t, share, image, pixel, count);
        if (kept.is_kept) {
            copy_rows(kept.v, (tile){t->value, line}, c, count);
            copy_rows(kept.v_dot, (tile){g + 4 * c * line, line}, c, count);
        } else {
            value_layout_and_tangents(l, t, count, kept.layout);
        }
        long s_line = kept.layout.line;
        int direct = count == padded && !l->channels_last && !l->half;
        long at = row_at(l, image, 0, pixel);
        tile out = direct ? (tile){(float *)l->dgrad + at, l->pixels} : (tile){t->out, line};
        mix_curves(c, padded, k, mixing, kept.layout, (tile){g, line}, t->u, line, dv, dv_dot, out);
        if (!direct) write_block(l, image, pixel, count, t->out, t->grad_pm, NULL, l->dgrad);
        product(k, padded, 4 * c, stacked, 4 * c, g, line, start, NULL, 0, draw, line);
        product(k, padded, 7 * c, stacked_dot, 7 * c, g, line, start + k, NULL, 0, draw_dot, line);
        for (long j = 0; j < padded; j += LANES) {
            const float *s = kept.layout.at + j, *s_dot = s + k * s_line;
            vec common = {0}, common_dot = {0};
            for (long i = 0; i < k; i++) {
                vec ds = load(draw + i * line + j), si = load(s + i * s_line);
                common += si * ds;
                common_dot += load(s_dot + i * s_line) * ds + si * load(draw_dot + i * line + j);
            }
            for (long i = 0; i < k; i++) {
                float *to_draw = draw + i * line + j, *to_dot = draw_dot + i * line + j;
                vec ds = load(to_draw) - common, si = load(s + i * s_line);
                store(to_draw, si * ds);
                store(to_dot, load(s_dot + i * s_line) * ds + si * (load(to_dot) - common_dot));
            }
        }
        add_rows(draw_dot, line, 2 * k, padded, row_sums);
        product(c, wide, count, dv_dot, line, t->x_pm, wide_line, NULL, weight_sums, wide, weight_sums, wide);
        product(c, wide, count, dv, line, t->u_pm, wide_line, NULL, weight_sums, wide, weight_sums, wide);
        product(k, wide, count, draw_dot, line, t->x_pm, wide_line, NULL, filter_sums, wide, filter_sums, wide);
        product(k, wide, count, draw, line, t->u_pm, wide_line, NULL, filter_sums, wide, filter_sums, wide);
        if (l->filters_dot)
            product(k, wide, count, draw, line, t->x_pm, wide_line, NULL, first_sums, wide, first_sums, wide);
        tile dx = direct ? (tile){(float *)l->out + at, l->pixels} : (tile){t->out, line};
        product(c, padded, depth, t->turned, 2 * (c + k), dv_dot, line, NULL, NULL, 0, dx.at, dx.line);
        if (!direct) write_block(l, image, pixel, count, t->out, t->grad_pm, NULL, l->out);
    }
    for (long i = 0; i < 2 * k; i++) /* the sums over x - xs; see second_pass_backward */
        for (long j = 0; j < c; j++) filter_sums[i * wide + j] += row_sums[i] * t->centre[j];
}

/* ---- Sharing out ------------------------------------------------------------------------------------------------- */

typedef struct job {
    layer *l;
    int phase; /* 0: both passes, image by image; 1, 2: that pass */
    atomic_long next;
} job;

/* From the sums over an image's pixels, what its second pass needs. */
static void finish_first_pass(const layer *l, const tiles *t, long image) {
    if (l->order == 0) {
        moments(l, t, image);
    } else {
        float drho = l->order == 1 ? slopes_of_moments(l, t, image) : curvatures(l, t, image);
        l->area_sums[image * l->segments * l->entities] = drho;
    }
}

static void run_share(layer *l, int phase, long share) {
    tiles t = divide(l, l->scratch + share * l->scratch_size, NULL);
    long units = l->images * l->segments, begin = share * units / l->shares, end = (share + 1) * units / l->shares;
    if (l->order && phase != 1)
        memset(l->weight_sums + share * l->channels * l->wide, 0, (size_t)(l->channels * l->wide) * 4);
    for (long unit = begin, last = -1; unit < end; unit++) {
        long image = unit / l->segments, segment = unit % l->segments;
        /* Cut at whole blocks, so that only an image's last block may be shorter. */
        long blocks = (l->pixels + l->block - 1) / l->block;
        long from = segment * blocks / l->segments * l->block;
        long to = least(l->pixels, (segment + 1) * blocks / l->segments * l->block);
        if (image != last) enter_image(l, &t, image, last < 0);
        last = image;
        if (phase != 2) {
            if (l->order == 2) {
                first_pass_of_tangents(l, &t, share, image, unit, from, to);
            } else {
                first_pass(l, &t, share, image, unit, from, to);
            }
        }
        if (phase == 0) finish_first_pass(l, &t, image);
        if (phase == 1) continue;
        if (l->order == 2) {
            second_pass_of_tangents(l, &t, share, image, unit, from, to);
        } else if (l->order == 1) {
            second_pass_backward(l, &t, share, image, unit, from, to);
        } else {
            mixing(l, &t, image);
            second_pass_forward(l, &t, share, image, from, to);
        }
    }
}

static void work(void *context) {
    job *j = context;
    for (long share; (share = atomic_fetch_add(&j->next, 1)) < j->l->shares;) run_share(j->l, j->phase, share);
}

static void *thread_work(void *context) {
    work(context);
    return NULL;
}

/* Which thread takes a share depends on timing, and so does how many threads there are; what is computed does not.
   Where torch's own team can be had it is taken: after an operation of torch its threads spin for milliseconds, and
   other threads would have to share the cores with them. */
static void share_out(layer *l, int phase) {
    job j = {.l = l, .phase = phase};
    atomic_init(&j.next, 0);
    if (l->shares == 1) {
        work(&j);
    } else if (l->team) {
        l->team(work, &j, (unsigned)l->shares, 0);
    } else {
        pthread_t threads[MAX_SHARES];
        long started = 0;
        while (started < l->shares - 1 && !pthread_create(&threads[started], NULL, thread_work, &j)) started++;
        work(&j);
        while (started) pthread_join(threads[--started], NULL);
    }
}

static void both_passes(layer *l) {
    if (l->segments == 1) {
        share_out(l, 0);
        return;
    }
    long size = l->tables * l->entities * l->wide;
    share_out(l, 1);
    tiles t = divide(l, l->scratch, NULL);
    for (long image = 0; image < l->images; image++) {
        merge(l, image, l->sums, size);
        merge(l, image, l->area_sums, l->entities);
        enter_image(l, &t, image, image == 0);
        finish_first_pass(l, &t, image);
    }
    share_out(l, 2);
}

void attnorm_forward(layer *l) {
    prepare(l, 0);
    both_passes(l);
}

/* The gradients of the parameters, from what the shares have found. */
static void gather_gradients(layer *l) {
    long n = l->images, c = l->channels, k = l->entities, wide = l->wide, segments = l->segments;
    double drho = 0;
    for (long i = 0; i < n; i++) drho += l->area_sums[i * segments * k];
    *l->drho = (float)drho;
    memset(l->dbias, 0, (size_t)(k * c) * 4);
    memset(l->dweight, 0, (size_t)(k * c) * 4);
    for (long image = 0; image < n; image++) {
        const float *sums = l->sums + image * segments * l->tables * k * wide;
        for (long i = 0; i < k; i++)
            for (long j = 0; j < c; j++) {
                l->dbias[i * c + j] += sums[i * wide + j];
                l->dweight[i * c + j] += sums[(k + i) * wide + j];
            }
    }
    for (long which = 0; which < l->order; which++) {
        float *dfilters = which ? l->dfilters_dot : l->dfilters, *doffset = which ? l->doffset_dot : l->doffset;
        memset(dfilters, 0, (size_t)(l->filter_images * k * c) * 4);
        memset(doffset, 0, (size_t)(l->filter_images * k) * 4);
        for (long unit = 0; unit < n * segments; unit++) {
            long own = l->filter_images > 1 ? unit / segments : 0, rows = (unit * l->order + which) * k;
            for (long i = 0; i < k; i++) {
                doffset[own * k + i] += l->row_sums[rows + i];
                for (long j = 0; j < c; j++)
                    dfilters[(own * k + i) * c + j] += l->filter_sums[(rows + i) * wide + j];
            }
        }
    }
    for (long share = 0; share < l->shares; share++) {
        const float *sums = l->weight_sums + share * c * wide;
        for (long i = 0; i < c; i++)
            for (long j = 0; j < c; j++)
                l->dvalue_weight[i * c + j] = (share ? l->dvalue_weight[i * c + j] : 0) + sums[i * wide + j];
    }
}

void attnorm_backward(layer *l) {
    prepare(l, 1);
    both_passes(l);
    gather_gradients(l);
}

void attnorm_double_backward(layer *l) {
    prepare(l, 2);
    both_passes(l);
    gather_gradients(l);
}
