/* Two-factor einsums and mixtures of them on a CPU: forward and backward.  See c_body.py, which compiles and
 * calls this file, and torch_body.py for the three primitives, which are the same for both bodies.
 *
 * Letters are those of the contraction, in which the first core comes first (structured.py):
 *     a alpha  b beta  g gamma  d delta  e epsilon  f phi  r rho
 *     u = (g, b), U of them     v = (f, d), V of them     p = (g, r, b)     q = (r, f, d)
 * A token's input is x[u][a] and its output y[v][e]; for the tile's rows
 *     z[u][q] = sum_a x[u][a] first[g][q][a]          dz[v][p] = gate sum_e dy[v][e] second[f][e][p]
 *     y[v][e] = gate sum_p z[u][q] second[f][e][p]    dx[u][a] = sum_q dz[v][p] first[g][q][a]
 * so that the backward is the forward with its roles exchanged.  Each of the six products of a layer is the
 * same small one, C[m][n] (+)= scale[m] sum_k A[m][k] B[k][n], with n contiguous in memory and A read one
 * number at a time, from wherever it lies: z is never transposed.
 *
 * Each slot (a thread's share) has a range of tokens, taken in blocks: a block's tokens are routed, their
 * assignments sorted by expert, and the rows of an expert taken in tiles of at most TILE.  A tile's rows of x
 * and dy are copied together first, group by group, and those of y and dx written back: in place they lie
 * far apart, at powers of two, and push each other out of the cache.  All sums have an order that depends on
 * the number of slots alone.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTOR_BYTES 64
#define MR 8    /* rows of a register block, two vectors wide */
#elif defined(__AVX__)
#include <immintrin.h>
#define VECTOR_BYTES 32
#define MR 6
#else
#define VECTOR_BYTES 16
#define MR 8
#endif
#define VL ((int64_t)(VECTOR_BYTES / sizeof(REAL)))  /* numbers in a vector */
#define TILE 32     /* rows of a tile */
#define BLOCK 512   /* tokens of a block */
#define FEW 8       /* rows up to which the cores are not packed */
#define AHEAD 2     /* rows of x or y that are fetched ahead */

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vec load(const REAL *p) { return *(const loose *)p; }
INLINE void store(REAL *p, vec v) { *(loose *)p = v; }

#if defined(__AVX__) && !defined(__AVX512F__)
INLINE __m256i lanes(int64_t n) {   /* a mask of the first n words of 32 bits */
    static const int32_t mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(mask + 8 - n));
}
#endif

/* The first n numbers of a vector, 1 <= n <= VL; the others are 0, and are left alone in memory. */
INLINE vec load_part(const REAL *p, int64_t n) {
#if defined(__AVX512F__)
    if (sizeof(REAL) == 4) return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
    return (vec)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif defined(__AVX__)
    if (sizeof(REAL) == 4) return (vec)_mm256_maskload_ps((const float *)p, lanes(n));
    return (vec)_mm256_maskload_pd((const double *)p, lanes(2 * n));
#else
    vec v = {0};
    memcpy(&v, p, n * sizeof(REAL));
    return v;
#endif
}

INLINE void store_part(REAL *p, vec v, int64_t n) {
#if defined(__AVX512F__)
    if (sizeof(REAL) == 4) _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
    else _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#elif defined(__AVX__)
    if (sizeof(REAL) == 4) _mm256_maskstore_ps((float *)p, lanes(n), (__m256)v);
    else _mm256_maskstore_pd((double *)p, lanes(2 * n), (__m256d)v);
#else
    memcpy(p, &v, n * sizeof(REAL));
#endif
}

INLINE REAL sum_of_lanes(vec v) {
#if defined(__AVX512F__)
    if (sizeof(REAL) == 4) return (REAL)_mm512_reduce_add_ps((__m512)v);
    return (REAL)_mm512_reduce_add_pd((__m512d)v);
#else
    REAL total = 0;
    for (int64_t l = 0; l < VL; l++) total += v[l];
    return total;
#endif
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n) { return (n + VL - 1) / VL * VL; }

/* ---- The small product --------------------------------------------------------------------------------- */

enum { ROWS,    /* A[m][k] is a[m][k] */
       SUMS,    /* a[m][at[k]] */
       CORE };  /* a[m][k * stride] */

/* acc[m][j] += A[m][k] B[k][j] for k = first + i, M <= MR rows of A and NV <= 2 vectors of B's columns.
 * Row m of A is a[m], see above; B's rows begin ldb apart. */
INLINE void multiply_one(const int kind, const int M, const int NV, const int part, const int64_t tail,
                         vec acc[MR][2], const int64_t first, const int64_t i, const REAL *const a[MR],
                         const int64_t *at, const int64_t stride, const REAL *b, const int64_t ldb) {
    const int64_t k = first + i;
    const int64_t place = kind == ROWS ? first : kind == SUMS ? at[k] : k * stride;
    vec bv[2];
    UNROLL for (int j = 0; j < NV; j++)
        bv[j] = part && j == NV - 1 ? load_part(b + k * ldb + j * VL, tail) : load(b + k * ldb + j * VL);
    UNROLL for (int m = 0; m < M; m++) {
        const REAL am = a[m][place + (kind == ROWS ? i : 0)];
        UNROLL for (int j = 0; j < NV; j++) acc[m][j] += am * bv[j];
    }
}

/* acc[m][j] = sum_k A[m][k] B[k][j].  The loop over k costs as much as a step of one vector's width: such
 * steps are unrolled. */
INLINE void multiply(const int kind, const int M, const int NV, const int part, const int64_t tail,
                     vec acc[MR][2], const int64_t K, const REAL *const a[MR], const int64_t *at,
                     const int64_t stride, const REAL *b, const int64_t ldb) {
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int j = 0; j < NV; j++) acc[m][j] = (vec){0};
    int64_t k = 0;
    if (NV == 1 && kind != CORE)
        for (; k + 8 <= K; k += 8)
            UNROLL for (int64_t i = 0; i < 8; i++)
                multiply_one(kind, M, NV, part, tail, acc, k, i, a, at, stride, b, ldb);
    for (; k < K; k++) multiply_one(kind, M, NV, part, tail, acc, k, 0, a, at, stride, b, ldb);
}

/* Runs body(NV, part, n, tail) over the columns 0 <= n < N. */
#define COLUMNS(N, body) do { \
        int64_t n = 0; \
        for (; n + 2 * VL <= (N); n += 2 * VL) { body(2, 0, n, 0) } \
        const int64_t left = (N) - n; \
        if (left > VL) { body(2, 1, n, left - VL) } \
        else if (left == VL) { body(1, 0, n, 0) } \
        else if (left > 0) { body(1, 1, n, left) } \
    } while (0)

/* Runs body(M) for blocks of rows i ... i + M, with i going from first to end. */
#define BLOCKS(first, end, body) do { \
        int64_t i = (first); \
        for (; i + MR <= (end); i += MR) body(MR); \
        if (MR > 4 && i + 4 <= (end)) { body(4); i += 4; } \
        for (; i + 2 <= (end); i += 2) body(2); \
        if (i < (end)) body(1); \
    } while (0)

INLINE vec load_n(const REAL *p, const int whole, const int64_t n) {
    return whole ? load(p) : load_part(p, n);
}

INLINE void store_n(REAL *p, vec v, const int whole, const int64_t n) {
    if (whole) store(p, v);
    else store_part(p, v, n);
}

/* ---- The three primitives ------------------------------------------------------------------------------ */

typedef struct {            /* groups of rows: number n of row m is at[group * step + m * row + n] */
    REAL *at;
    int64_t row, step;
} rows;

typedef struct {            /* the cores of groups: share groups have one core after another, rows ld apart */
    const REAL *w;
    int64_t share, ld;
} cores;

typedef struct {            /* single numbers of z: z.at[from[group] + at[k] + m * z.row] */
    rows z;
    const int64_t *from, *at;
} numbers;

/* to[group][m][n] = scale[m] sum_k from[group][m][k] core[k][n] */
INLINE void rows_block(const int M, const int64_t i, const REAL *from, const int64_t from_row,
                       const int64_t K, const int64_t N, const REAL *w, const int64_t ldw, REAL *to,
                       const int64_t to_row, const REAL *scale) {
    const REAL *a[MR];
    UNROLL for (int m = 0; m < M; m++) a[m] = from + (i + m) * from_row;
#define BODY(NV, part, n, tail) { \
        vec acc[MR][2]; \
        multiply(ROWS, M, NV, part, tail, acc, K, a, NULL, 0, w + n, ldw); \
        UNROLL for (int m = 0; m < M; m++) \
            UNROLL for (int j = 0; j < NV; j++) \
                store_n(to + (i + m) * to_row + n + j * VL, scale ? acc[m][j] * scale[i + m] : acc[m][j], \
                        !(part && j == NV - 1), tail); \
    }
    COLUMNS(N, BODY);
#undef BODY
}

static void rows_to_z(int64_t count, int64_t groups, int64_t K, int64_t N, rows from, cores w, rows to,
                      const REAL *scale) {
    for (int64_t group = 0; group < groups; group++) {
        const REAL *core = w.w + group / w.share * K * w.ld, *in = from.at + group * from.step;
        REAL *out = to.at + group * to.step;
#define BODY(M) rows_block(M, i, in, from.row, K, N, core, w.ld, out, to.row, scale)
        BLOCKS(0, count, BODY);
#undef BODY
    }
}

/* to[group][m][n] (+)= scale[m] sum_k from(group, k, m) core[k][n]
 * dot (TILE, VL), or NULL: the products of to's rows with x's are added to it, lane by lane. */
INLINE void sums_block(const int M, const int64_t i, const int64_t g0, const int64_t g1, const int64_t K,
                       const int64_t N, const numbers from, const cores w, const rows to, const REAL *scale,
                       const int add, const rows x, REAL *dot) {
    vec sum[MR];
    UNROLL for (int m = 0; m < M; m++) sum[m] = dot ? load(dot + (i + m) * VL) : (vec){0};
    for (int64_t group = g0; group < g1; group++) {
        const REAL *a[MR], *core = w.w + group / w.share * K * w.ld;
        UNROLL for (int m = 0; m < M; m++) a[m] = from.z.at + from.from[group] + (i + m) * from.z.row;
#define BODY(NV, part, n, tail) { \
            vec acc[MR][2]; \
            multiply(SUMS, M, NV, part, tail, acc, K, a, from.at, 0, core + n, w.ld); \
            UNROLL for (int m = 0; m < M; m++) \
                UNROLL for (int j = 0; j < NV; j++) { \
                    const int whole = !(part && j == NV - 1); \
                    REAL *p = to.at + group * to.step + (i + m) * to.row + n + j * VL; \
                    vec v = scale ? acc[m][j] * scale[i + m] : acc[m][j]; \
                    if (dot) \
                        sum[m] += v * load_n(x.at + group * x.step + (i + m) * x.row + n + j * VL, whole, \
                                             tail); \
                    store_n(p, add ? v + load_n(p, whole, tail) : v, whole, tail); \
                } \
        }
        COLUMNS(N, BODY);
#undef BODY
    }
    if (dot) UNROLL for (int m = 0; m < M; m++) store(dot + (i + m) * VL, sum[m]);
}

INLINE void z_to_rows(int64_t count, int64_t groups, int64_t K, int64_t N, numbers from, cores w, rows to,
                      const REAL *scale, const int add, rows x, REAL *dot) {
    /* VL neighbouring groups read the same lines of z */
    for (int64_t g = 0; g < groups; g += VL) {
        const int64_t end = least(groups, g + VL);
#define BODY(M) sums_block(M, i, g, end, K, N, from, w, to, scale, add, x, dot)
        BLOCKS(0, count, BODY);
#undef BODY
    }
}

/* Its four uses, each compiled on its own. */
static void outputs(int64_t count, int64_t groups, int64_t K, int64_t N, numbers from, cores w, rows to) {
    z_to_rows(count, groups, K, N, from, w, to, NULL, 0, to, NULL);
}

static void added_outputs(int64_t count, int64_t groups, int64_t K, int64_t N, numbers from, cores w,
                          rows to) {
    z_to_rows(count, groups, K, N, from, w, to, NULL, 1, to, NULL);
}

static void gated_outputs(int64_t count, int64_t groups, int64_t K, int64_t N, numbers from, cores w,
                          rows to, const REAL *scale) {
    z_to_rows(count, groups, K, N, from, w, to, scale, 0, to, NULL);
}

static void outputs_and_dots(int64_t count, int64_t groups, int64_t K, int64_t N, numbers from, cores w,
                             rows to, rows x, REAL *dot) {
    z_to_rows(count, groups, K, N, from, w, to, NULL, 0, x, dot);
}

/* core[group / share][m][n] (+)= sum_row from(group, m, row) in[group][row][n] */
INLINE void core_block(const int M, const int64_t i, const int64_t count, const int64_t g0, const int64_t g1,
                       const int64_t share, const int64_t all, const int64_t N, const numbers from,
                       const rows in, REAL *core, const int add) {
    for (int64_t group = g0; group < g1; group++) {
        const REAL *a[MR], *b = in.at + group * in.step;
        REAL *to = core + (group / share * all + i) * N;
        const int more = add || group % share;
        UNROLL for (int m = 0; m < M; m++) a[m] = from.z.at + from.from[group] + from.at[i + m];
#define BODY(NV, part, n, tail) { \
            vec acc[MR][2]; \
            multiply(CORE, M, NV, part, tail, acc, count, a, NULL, from.z.row, b + n, in.row); \
            UNROLL for (int m = 0; m < M; m++) \
                UNROLL for (int j = 0; j < NV; j++) { \
                    const int whole = !(part && j == NV - 1); \
                    REAL *p = to + m * N + n + j * VL; \
                    store_n(p, more ? acc[m][j] + load_n(p, whole, tail) : acc[m][j], whole, tail); \
                } \
        }
        COLUMNS(N, BODY);
#undef BODY
    }
}

static void core_gradient(int64_t count, int64_t groups, int64_t share, int64_t all, int64_t N, numbers from,
                          rows in, REAL *core, int add) {
    for (int64_t g = 0; g < groups; g += VL) {
        const int64_t end = least(groups, g + VL);
#define BODY(M) core_block(M, i, count, g, end, share, all, N, from, in, core, add)
        BLOCKS(0, all, BODY);
#undef BODY
    }
}

/* ---- Transposition ------------------------------------------------------------------------------------- */

#if VECTOR_BYTES == 64
#define LANES32(M, s) M(0,s),M(1,s),M(2,s),M(3,s),M(4,s),M(5,s),M(6,s),M(7,s),M(8,s),M(9,s),M(10,s),M(11,s), \
                      M(12,s),M(13,s),M(14,s),M(15,s)
#define LANES64(M, s) M(0,s),M(1,s),M(2,s),M(3,s),M(4,s),M(5,s),M(6,s),M(7,s)
#elif VECTOR_BYTES == 32
#define LANES32(M, s) M(0,s),M(1,s),M(2,s),M(3,s),M(4,s),M(5,s),M(6,s),M(7,s)
#define LANES64(M, s) M(0,s),M(1,s),M(2,s),M(3,s)
#else
#define LANES32(M, s) M(0,s),M(1,s),M(2,s),M(3,s)
#define LANES64(M, s) M(0,s),M(1,s)
#endif
#ifdef DOUBLE
#define LANES LANES64
#define LANE_COUNT (VECTOR_BYTES / 8)
typedef int64_t ints __attribute__((vector_size(VECTOR_BYTES)));
#else
#define LANES LANES32
#define LANE_COUNT (VECTOR_BYTES / 4)
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
#endif
#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)   /* gcc has it from 12 on */
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (ints){__VA_ARGS__})
#endif
/* Lanes of the exchange at distance s: of the pair (x, y), the first takes x where lane & s is 0 and else y
 * shifted up by s; the second y where lane & s is not 0 and else x shifted down. */
#define FIRST(j, s) ((j) & (s) ? LANE_COUNT + (j) - (s) : (j))
#define SECOND(j, s) ((j) & (s) ? LANE_COUNT + (j) : (j) + (s))
#define EXCHANGE(s) \
    if (LANE_COUNT > s) UNROLL for (int i = 0; i < LANE_COUNT; i++) if (!(i & s)) { \
        const vec x = v[i], y = v[(i + s) % LANE_COUNT]; \
        v[i] = SHUFFLE(x, y, LANES(FIRST, (s < LANE_COUNT ? s : 0))); \
        v[(i + s) % LANE_COUNT] = SHUFFLE(x, y, LANES(SECOND, (s < LANE_COUNT ? s : 0))); \
    }

/* out[j][i] = in[i][j], i < height, j < width; added to what is there if add. */
static void transpose(const REAL *in, int64_t in_row, REAL *out, int64_t out_row, int64_t height,
                      int64_t width, int add) {
    for (int64_t i = 0; i < height; i += LANE_COUNT)
        for (int64_t j = 0; j < width; j += LANE_COUNT) {
            if (i + LANE_COUNT <= height && j + LANE_COUNT <= width) {
                vec v[LANE_COUNT];
                UNROLL for (int k = 0; k < LANE_COUNT; k++) v[k] = load(in + (i + k) * in_row + j);
                EXCHANGE(1) EXCHANGE(2) EXCHANGE(4) EXCHANGE(8)
                UNROLL for (int k = 0; k < LANE_COUNT; k++) {
                    REAL *to = out + (j + k) * out_row + i;
                    store(to, add ? v[k] + load(to) : v[k]);
                }
            } else
                for (int64_t x = i; x < least(height, i + LANE_COUNT); x++)
                    for (int64_t y = j; y < least(width, j + LANE_COUNT); y++)
                        out[y * out_row + x] = in[x * in_row + y] + (add ? out[y * out_row + x] : 0);
        }
}

/* ---- Calls --------------------------------------------------------------------------------------------- */

/* Sizes of a call, in the order in which c_body.py passes them. */
typedef struct {
    int64_t T, E, k, routed;    /* tokens, experts (1 without), per token (1 without); with a router? */
    int64_t a, b, g, d, e, f, r, swapped;
    int64_t slots;
} sizes;

typedef struct {    /* a row of x or y: (groups, outer, inner), width numbers in all */
    int64_t width, groups, outer, inner;
    int64_t moved;  /* whether the products want (groups, inner, outer) */
} axes;

typedef void (*gomp)(void (*)(void *), void *, unsigned, unsigned);    /* GOMP_parallel */

typedef struct call {
    sizes s;
    int64_t U, V, P, Q, first_size, second_size;
    axes in, out;                   /* of x and dx, of y and dy */
    int64_t lda, ldb;               /* rows of the forward's cores, padded */
    const REAL *x, *first, *second, *router, *balance, *dy, *dlogits;
    const int64_t *experts;         /* (T,): the expert of each token, without a router */
    REAL *y, *logits, *dx, *dfirst, *dsecond, *drouter;
    int64_t *chosen;                /* (T, k) */
    gomp start;
    REAL *cores_a, *cores_b;        /* first[E][g][a][q], second[E][f][p][e] */
    REAL *router_t;                 /* (d_in, padded E) */
    int64_t *offsets;               /* tables: 0 ... E - 1, then the next four */
    const int64_t *z_from, *dz_from, *z_at, *dz_at;
    rows z, dz, in_rows, out_rows;  /* a tile's: steps alone */
    REAL *scratch;                  /* of the slots, slot_size each */
    int64_t slot_size, backward;
} call;

typedef struct {                    /* scratch of one slot */
    REAL *z, *dz, *in, *grad, *out, *dot, *dlogits, *s, *gates;
    REAL *first, *second, *router;  /* gradients */
    int64_t *seen;
    int32_t *order, *start;
} slot;

/* A tile's rows of z, x or y: a group's lie together, each padded. */
static rows tile_rows(int64_t width) {
    const int64_t row = round_up(width);
    return (rows){NULL, row, row * TILE + 3 * VL};  /* far from 4 KiB: groups must not share cache sets */
}

/* Lays out a slot's scratch, if base is not NULL; returns its size in REALs. */
static int64_t slot_layout(const call *c, REAL *base, slot *to) {
    const sizes *s = &c->s;
    const int64_t block = least(BLOCK, s->T);
    int64_t at = 0;
#define TAKE(name, n) do { \
        to->name = base ? base + at : NULL; \
        at += ((int64_t)(n) + 15) / 16 * 16; \
    } while (0)
    TAKE(z, c->z.step * c->U);
    TAKE(dz, c->backward ? c->dz.step * c->V : 0);
    TAKE(in, c->in_rows.step * c->U);
    TAKE(grad, c->backward ? c->in_rows.step * c->U : 0);
    TAKE(out, c->out_rows.step * c->V);
    TAKE(dot, TILE * VL);
    TAKE(dlogits, c->backward ? block * s->E : 0);
    TAKE(s, block * s->k);
    TAKE(gates, block * s->k);
    TAKE(first, c->backward ? c->first_size * s->E : 0);
    TAKE(second, c->backward ? c->second_size * s->E : 0);
    TAKE(router, c->backward && s->routed ? c->in.width * s->E : 0);
#undef TAKE
    if (base) {
        to->seen = (int64_t *)(base + at);
        to->start = (int32_t *)(to->seen + s->E);
        to->order = to->start + s->E + 2;
    }
    at += (8 * s->E + 4 * (s->E + 2 + block * s->k)) / (int64_t)sizeof(REAL) + 16;
    return (at + 15) / 16 * 16;
}

/* Everything that follows from the sizes. Returns the scratch that the call needs, in REALs. */
static int64_t prepare(call *c, const int64_t *dims, int64_t backward, REAL *scratch) {
    sizes *s = &c->s;
    memcpy(s, dims, sizeof *s);
    c->backward = backward;
    c->U = s->g * s->b, c->V = s->f * s->d, c->P = s->g * s->r * s->b, c->Q = s->r * s->f * s->d;
    c->in = (axes){s->a * c->U, s->g, s->a, s->b, s->swapped && s->b > 1};
    c->out = (axes){s->e * c->V, s->f, s->e, s->d, !s->swapped && s->d > 1};
    c->first_size = s->g * c->Q * s->a, c->second_size = s->f * s->e * c->P;
    c->lda = round_up(c->Q), c->ldb = round_up(s->e);
    c->z = tile_rows(c->Q), c->dz = tile_rows(c->P);
    c->in_rows = tile_rows(s->a), c->out_rows = tile_rows(s->e);
    int64_t at = 0;
#define TAKE(name, type, n) do { c->name = scratch ? (type *)(scratch + at) : NULL; \
        at += ((int64_t)(n) * (int64_t)sizeof(type) / (int64_t)sizeof(REAL) + 15) / 16 * 16; } while (0)
    TAKE(cores_a, REAL, s->E * s->g * s->a * c->lda);
    TAKE(cores_b, REAL, s->E * s->f * c->P * c->ldb);
    TAKE(router_t, REAL, s->routed ? c->in.width * round_up(s->E) : 0);
    TAKE(offsets, int64_t, s->E + c->U + c->V + c->P + c->Q);
    c->scratch = scratch ? scratch + at : NULL;
#undef TAKE
    slot ignored;
    c->slot_size = slot_layout(c, NULL, &ignored);
    if (scratch) {
        int64_t *to = c->offsets;
        for (int64_t e = 0; e < s->E; e++) *to++ = e;
        c->z_from = to;     /* of v: where z's q = (r = 0, v) is */
        for (int64_t v = 0; v < c->V; v++) *to++ = v;
        c->dz_from = to;    /* of u = (g, b): where dz's p = (g, r = 0, b) is */
        for (int64_t u = 0; u < c->U; u++) *to++ = u / s->b * s->r * s->b + u % s->b;
        c->z_at = to;       /* of p = (g, r, b): z's group u and, within it, r */
        for (int64_t p = 0; p < c->P; p++)
            *to++ = (p / (s->r * s->b) * s->b + p % s->b) * c->z.step + p / s->b % s->r * c->V;
        c->dz_at = to;      /* of q = (r, v): dz's group v and, within it, r */
        for (int64_t q = 0; q < c->Q; q++) *to++ = q % c->V * c->dz.step + q / c->V * s->b;
    }
    return at + c->slot_size * s->slots;
}

int64_t scratch_size(const int64_t *dims, int64_t backward) {
    call c = {0};
    return prepare(&c, dims, backward, NULL);
}

int64_t vector_bits(void) { return 8 * VECTOR_BYTES; }

/* ---- Threads ------------------------------------------------------------------------------------------- */

typedef struct job {
    void (*run)(const struct job *, int64_t);
    int64_t items, next;
    const call *call;
} job;

static void work(void *data) {
    job *j = data;
    int64_t i;
    while ((i = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->items) j->run(j, i);
}

static void *work_thread(void *data) { work(data); return NULL; }

/* run(0) ... run(items - 1) by as many threads as there are slots: those of torch's OpenMP, if its entry
 * point is given. Which thread runs an item does not matter to the result. */
static void parallel(const call *c, int64_t items, void (*run)(const job *, int64_t)) {
    job j = {run, items, 0, c};
    const int64_t threads = least(c->s.slots, items);
    if (threads <= 1) work(&j);
    else if (c->start) c->start(work, &j, (unsigned)threads, 0);
    else {
        pthread_t ids[64];
        int64_t n = 0;
        while (n < least(threads, 64) - 1 && pthread_create(&ids[n], NULL, work_thread, &j) == 0) n++;
        work(&j);
        while (n > 0) pthread_join(ids[--n], NULL);
    }
}

/* ---- Steps of a call ----------------------------------------------------------------------------------- */

/* The cores and the router as the forward reads them; one item is a group of one expert's first core, then of
 * its second, and the last is the router. */
static void pack(const job *j, int64_t i) {
    const call *c = j->call;
    const sizes *s = &c->s;
    if (i < s->E * s->g)
        transpose(c->first + i * c->Q * s->a, s->a, c->cores_a + i * s->a * c->lda, c->lda, c->Q, s->a, 0);
    else if ((i -= s->E * s->g) < s->E * s->f)
        transpose(c->second + i * s->e * c->P, c->P, c->cores_b + i * c->P * c->ldb, c->ldb, s->e, c->P, 0);
    else
        transpose(c->router, c->in.width, c->router_t, round_up(s->E), s->E, c->in.width, 0);
}

/* The k experts of a token: those with the largest logit + balance, in falling order; of equal ones the
 * first. */
static void choose(const call *c, int64_t t) {
    const int64_t E = c->s.E, k = c->s.k;
    for (int64_t i = 0; i < k; i++) {
        int64_t best = -1;
        REAL most = 0;
        for (int64_t e = 0; e < E; e++) {
            const REAL score = c->logits[t * E + e] + c->balance[e];
            int taken = 0;
            for (int64_t n = 0; n < i; n++) taken |= c->chosen[t * k + n] == e;
            if (!taken && (best < 0 || score > most)) best = e, most = score;
        }
        c->chosen[t * k + i] = best;
    }
}

/* The logits of tokens t0 ... t1, and their experts. */
static void route(const call *c, int64_t t0, int64_t t1) {
    const int64_t E = c->s.E;
    const rows x = {(REAL *)c->x + t0 * c->in.width, c->in.width, 0}, logits = {c->logits + t0 * E, E, 0};
    rows_to_z(t1 - t0, 1, c->in.width, E, x, (cores){c->router_t, 1, round_up(E)}, logits, NULL);
    for (int64_t t = t0; t < t1; t++) choose(c, t);
}

/* The gates of a token: the softmax of its chosen logits; for k = 1, the probability among all experts. */
static void gates_of(const call *c, int64_t t, REAL *gates) {
    const int64_t E = c->s.E, k = c->s.k, *chosen = c->chosen + t * k;
    const REAL *logits = c->logits + t * E;
    const int64_t n = k == 1 ? E : k;
    REAL most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const REAL v = logits[k == 1 ? i : chosen[i]];
        most = v > most || v != v ? v : most;
    }
    for (int64_t i = 0; i < n; i++) sum += (REAL)exp(logits[k == 1 ? i : chosen[i]] - most);
    for (int64_t i = 0; i < k; i++) gates[i] = (REAL)exp(logits[chosen[i]] - most) / sum;
}

/* The assignments t * k + i of a block, t counted from t0, sorted by expert: those of e are
 * order[start[e]] ... order[start[e + 1] - 1]. */
static void sort(const call *c, int64_t t0, int64_t t1, int32_t *start, int32_t *order) {
    const int64_t E = c->s.E, k = c->s.k, *chosen = (c->s.routed ? c->chosen : c->experts);
    memset(start, 0, (E + 2) * sizeof *start);
    if (!chosen) {
        start[1] = (int32_t)(t1 - t0);
        for (int64_t t = 0; t < t1 - t0; t++) order[t] = (int32_t)t;
        return;
    }
    chosen += t0 * k;
    for (int64_t i = 0; i < (t1 - t0) * k; i++) start[chosen[i] + 2]++;
    for (int64_t e = 0; e < E; e++) start[e + 2] += start[e + 1];
    for (int64_t i = 0; i < (t1 - t0) * k; i++) order[start[chosen[i] + 1]++] = (int32_t)i;
}

/* Whether expert e comes first among those of the token: its rows are stored, the later ones' added. */
static int is_first(const call *c, int64_t t, int64_t e) {
    if (!c->s.routed) return 1;
    for (int64_t i = 0; i < c->s.k; i++)
        if (c->chosen[t * c->s.k + i] < e) return 0;
    return 1;
}

/* A tile of expert e: its assignments are order[0] ... order[count - 1], of tokens counted from t0. */
typedef struct {
    int64_t e, t0, count;
    const int32_t *order;
} place;

static int64_t token_of(const call *c, const place *p, int64_t m) { return p->t0 + p->order[m] / c->s.k; }

/* Copies the rows of all tokens (T, width) that the tile reads to its own. */
static void read_rows(const call *c, const place *p, const REAL *all, const axes *s, rows to) {
    for (int64_t m = 0; m < p->count; m++) {
        const REAL *x = all + token_of(c, p, m) * s->width;
        const int64_t ahead = all + token_of(c, p, least(m + AHEAD, p->count - 1)) * s->width - x;
        REAL *row = to.at + m * to.row;
        if (s->moved)
            for (int64_t i = 0; i < s->groups; i++, x += s->outer * s->inner, row += s->inner * to.step)
                transpose(x, s->inner, row, to.step, s->outer, s->inner, 0);
        else
            for (int64_t i = 0; i < s->groups * s->inner; i++, x += s->outer, row += to.step) {
                int64_t n = 0;
                for (; n + VL <= s->outer; n += VL) {
                    __builtin_prefetch(x + ahead + n, 0);
                    store(row + n, load(x + n));
                }
                if (n < s->outer) store_part(row + n, load_part(x + n, s->outer - n), s->outer - n);
            }
    }
}

/* The tile's results to the rows of all tokens: of several experts the first stores, the others add. */
static void return_rows(const call *c, const place *p, REAL *all, const axes *s, rows from) {
    for (int64_t m = 0; m < p->count; m++) {
        const int64_t token = token_of(c, p, m), add = !is_first(c, token, p->e);
        const REAL *row = from.at + m * from.row;
        REAL *y = all + token * s->width;
        const int64_t ahead = all + token_of(c, p, least(m + AHEAD, p->count - 1)) * s->width - y;
        if (s->moved)
            for (int64_t i = 0; i < s->groups; i++, row += s->inner * from.step, y += s->outer * s->inner)
                transpose(row, from.step, y, s->inner, s->inner, s->outer, add);
        else
            for (int64_t i = 0; i < s->groups * s->inner; i++, row += from.step, y += s->outer) {
                int64_t n = 0;
                for (; n + VL <= s->outer; n += VL) {
                    __builtin_prefetch(y + ahead + n, 1);
                    store(y + n, add ? load(y + n) + load(row + n) : load(row + n));
                }
                const int64_t left = s->outer - n;
                if (left) store_part(y + n, add ? load_part(y + n, left) + load_part(row + n, left)
                                                : load_part(row + n, left), left);
            }
    }
}

/* The gates of the tile's rows. */
static void scale_rows(const place *p, const REAL *gates, REAL *scale) {
    for (int64_t m = 0; m < p->count; m++) scale[m] = gates[p->order[m]];
}

/* A tile's rows in a slot's scratch. */
static rows placed(REAL *data, rows steps) { return (rows){data, steps.row, steps.step}; }

static void forward_slot(const job *j, int64_t number) {
    const call *c = j->call;
    const sizes *s = &c->s;
    slot w;
    slot_layout(c, c->scratch + number * c->slot_size, &w);
    const int64_t begin = s->T * number / s->slots, end = s->T * (number + 1) / s->slots;
    const rows x = placed(w.in, c->in_rows), y = placed(w.out, c->out_rows), z = placed(w.z, c->z);
    const numbers of_z = {z, c->z_from, c->z_at};
    REAL scale[TILE];
    for (int64_t t0 = begin; t0 < end; t0 += BLOCK) {
        const int64_t t1 = least(end, t0 + BLOCK);
        if (s->routed) {
            route(c, t0, t1);
            for (int64_t i = t0; i < t1; i++) gates_of(c, i, w.gates + (i - t0) * s->k);
        }
        sort(c, t0, t1, w.start, w.order);
        for (int64_t e = 0; e < s->E; e++)
            for (int64_t i = w.start[e]; i < w.start[e + 1]; i += TILE) {
                const place p = {e, t0, least(TILE, w.start[e + 1] - i), w.order + i};
                const cores first = {c->cores_a + e * s->g * s->a * c->lda, s->b, c->lda};
                const cores second = {c->cores_b + e * s->f * c->P * c->ldb, s->d, c->ldb};
                read_rows(c, &p, c->x, &c->in, x);
                rows_to_z(p.count, c->U, s->a, c->Q, x, first, z, NULL);
                if (s->routed) {
                    scale_rows(&p, w.gates, scale);
                    gated_outputs(p.count, c->V, c->P, s->e, of_z, second, y, scale);
                } else outputs(p.count, c->V, c->P, s->e, of_z, second, y);
                return_rows(c, &p, c->y, &c->out, y);
            }
    }
}

INLINE REAL dot_product(const REAL *x, const REAL *y, int64_t n) {
    if (n == VL) return sum_of_lanes(load(x) * load(y));
    if (n < VL) return sum_of_lanes(load_part(x, n) * load_part(y, n));
    vec sum[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        UNROLL for (int j = 0; j < 4; j++) sum[j] += load(x + i + j * VL) * load(y + i + j * VL);
    for (; i + VL <= n; i += VL) sum[0] += load(x + i) * load(y + i);
    if (i < n) sum[1] += load_part(x + i, n - i) * load_part(y + i, n - i);
    return sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* The forward for a few rows, by dot products with the cores as they are: packing them would take longer. */
static void forward_few(const call *c) {
    const sizes *s = &c->s;
    slot w;
    slot_layout(c, c->scratch, &w);
    for (int64_t t = 0; t < s->T; t++) {
        const REAL *x = c->x + t * c->in.width;
        REAL *y = c->y + t * c->out.width;
        if (s->routed) {
            for (int64_t e = 0; e < s->E; e++)
                c->logits[t * s->E + e] = dot_product(c->router + e * c->in.width, x, c->in.width);
            choose(c, t);
            gates_of(c, t, w.gates);
        }
        if (c->in.moved) {
            for (int64_t u = 0; u < s->g; u++)
                transpose(x + u * s->a * s->b, s->b, w.in + u * s->b * s->a, s->a, s->a, s->b, 0);
            x = w.in;
        }
        for (int64_t i = 0; i < s->k; i++) {
            const int64_t e = s->routed ? c->chosen[t * s->k + i] : c->experts ? c->experts[t] : 0;
            const REAL gate = s->routed ? w.gates[i] : 1;
            for (int64_t u = 0; u < c->U; u++) {
                const REAL *core = c->first + e * c->first_size + u / s->b * c->Q * s->a;
                REAL *z = w.z + u / s->b * s->r * s->b + u % s->b;  /* z[v][p] */
                for (int64_t r = 0; r < s->r; r++)
                    for (int64_t v = 0; v < c->V; v++, core += s->a)
                        z[v * c->P + r * s->b] = dot_product(core, x + u * s->a, s->a);
            }
            for (int64_t v = 0; v < c->V; v++) {
                const REAL *core = c->second + e * c->second_size + v / s->d * s->e * c->P;
                REAL *to = c->out.moved ? y + v / s->d * s->e * s->d + v % s->d : y + v * s->e;
                const int64_t step = c->out.moved ? s->d : 1;
                for (int64_t n = 0; n < s->e; n++, core += c->P, to += step) {
                    const REAL part = gate * dot_product(core, w.z + v * c->P, c->P);
                    *to = i ? *to + part : part;
                }
            }
        }
    }
}

/* Gradient of the block's logits, from s, each assignment's gate times its gate's gradient. */
static void logit_gradients(const call *c, int64_t t0, int64_t t1, const slot *w) {
    const int64_t E = c->s.E, k = c->s.k;
    for (int64_t t = t0; t < t1; t++) {
        const REAL *s = w->s + (t - t0) * k, *g = w->gates + (t - t0) * k;
        const int64_t *chosen = c->chosen + t * k;
        REAL *d = w->dlogits + (t - t0) * E, sum = 0;
        if (c->dlogits) memcpy(d, c->dlogits + t * E, E * sizeof(REAL));
        else memset(d, 0, E * sizeof(REAL));
        for (int64_t i = 0; i < k; i++) sum += s[i];
        if (k > 1) {
            for (int64_t i = 0; i < k; i++) d[chosen[i]] += s[i] - g[i] * sum;
            continue;
        }
        const double shift = log(g[0]) - c->logits[t * E + chosen[0]];  /* logit + shift: log probability */
        for (int64_t e = 0; e < E; e++) d[e] -= (REAL)exp(c->logits[t * E + e] + shift) * sum;
        d[chosen[0]] += sum;
    }
}

/* dx += dlogits router and drouter += dlogits^T x, for a block. */
static void router_gradients(const call *c, int64_t t0, int64_t t1, const slot *w, int add) {
    const int64_t E = c->s.E;
    const int64_t from[1] = {0}, *at = c->offsets;  /* 0, 1, 2 ...: the experts */
    const rows x = {(REAL *)c->x + t0 * c->in.width, c->in.width, 0};
    const rows dx = {c->dx + t0 * c->in.width, c->in.width, 0};
    const numbers logits = {{w->dlogits, E, 0}, from, at};
    added_outputs(t1 - t0, 1, E, c->in.width, logits, (cores){c->router, 1, c->in.width}, dx);
    core_gradient(t1 - t0, 1, 1, E, c->in.width, logits, x, w->router, add);
}

static void backward_slot(const job *j, int64_t number) {
    const call *c = j->call;
    const sizes *s = &c->s;
    slot w;
    slot_layout(c, c->scratch + number * c->slot_size, &w);
    const int64_t begin = s->T * number / s->slots, end = s->T * (number + 1) / s->slots;
    const rows x = placed(w.in, c->in_rows), dx = placed(w.grad, c->in_rows), dy = placed(w.out, c->out_rows);
    const rows z = placed(w.z, c->z), dz = placed(w.dz, c->dz);
    const numbers of_z = {z, c->z_from, c->z_at}, of_dz = {dz, c->dz_from, c->dz_at};
    REAL gates[TILE], *scale = s->routed ? gates : NULL;
    memset(w.seen, 0, s->E * sizeof *w.seen);
    for (int64_t t0 = begin; t0 < end; t0 += BLOCK) {
        const int64_t t1 = least(end, t0 + BLOCK);
        if (s->routed)
            for (int64_t i = t0; i < t1; i++) gates_of(c, i, w.gates + (i - t0) * s->k);
        sort(c, t0, t1, w.start, w.order);
        for (int64_t e = 0; e < s->E; e++)
            for (int64_t i = w.start[e]; i < w.start[e + 1]; i += TILE) {
                const place p = {e, t0, least(TILE, w.start[e + 1] - i), w.order + i};
                const cores forward = {c->cores_a + e * s->g * s->a * c->lda, s->b, c->lda};
                const cores first = {c->first + e * c->first_size, s->b, s->a};
                const cores second = {c->second + e * c->second_size, s->d, c->P};
                REAL *dfirst = w.first + e * c->first_size, *dsecond = w.second + e * c->second_size;
                if (s->routed) scale_rows(&p, w.gates, gates);
                read_rows(c, &p, c->x, &c->in, x);
                read_rows(c, &p, c->dy, &c->out, dy);
                rows_to_z(p.count, c->U, s->a, c->Q, x, forward, z, scale);     /* z again */
                core_gradient(p.count, c->V, s->d, c->P, s->e, of_z, dy, dsecond, w.seen[e] != 0);
                rows_to_z(p.count, c->V, s->e, c->P, dy, second, dz, scale);
                core_gradient(p.count, c->U, s->b, c->Q, s->a, of_dz, x, dfirst, w.seen[e] != 0);
                if (s->routed) {
                    memset(w.dot, 0, p.count * VL * sizeof(REAL));
                    outputs_and_dots(p.count, c->U, c->Q, s->a, of_dz, first, dx, x, w.dot);
                    for (int64_t m = 0; m < p.count; m++)
                        w.s[p.order[m]] = sum_of_lanes(load(w.dot + m * VL));
                } else outputs(p.count, c->U, c->Q, s->a, of_dz, first, dx);
                return_rows(c, &p, c->dx, &c->in, dx);
                w.seen[e] = 1;
            }
        if (s->routed) {
            logit_gradients(c, t0, t1, &w);
            router_gradients(c, t0, t1, &w, t0 > begin);
        }
    }
    for (int64_t e = 0; e < s->E; e++)
        if (!w.seen[e]) {
            memset(w.first + e * c->first_size, 0, c->first_size * sizeof(REAL));
            memset(w.second + e * c->second_size, 0, c->second_size * sizeof(REAL));
        }
    if (s->routed && begin == end) memset(w.router, 0, c->in.width * s->E * sizeof(REAL));
}

/* Adds the slots' gradients up; one item is an expert's group of a core, or the router. */
static void reduce(const job *j, int64_t i) {
    const call *c = j->call;
    const sizes *s = &c->s;
    slot w0, w;
    slot_layout(c, c->scratch, &w0);
    REAL *total;
    int64_t at, n;
    const int part = i < s->E * s->g ? 0 : i < s->E * (s->g + s->f) ? 1 : 2;
    if (part == 0) n = c->Q * s->a, at = i * n, total = w0.first + at;
    else if (part == 1) n = c->P * s->e, at = (i - s->E * s->g) * n, total = w0.second + at;
    else n = c->in.width * s->E, at = 0, total = w0.router;
    for (int64_t k = 1; k < s->slots; k++) {
        slot_layout(c, c->scratch + k * c->slot_size, &w);
        const REAL *from = (part == 0 ? w.first : part == 1 ? w.second : w.router) + at;
        for (int64_t l = 0; l < n; l++) total[l] += from[l];
    }
    if (part == 0) memcpy(c->dfirst + at, total, n * sizeof(REAL));
    else if (part == 1) transpose(total, s->e, c->dsecond + at, c->P, c->P, s->e, 0);
    else memcpy(c->drouter, total, n * sizeof(REAL));
}

/* experts: (T,), or NULL; router, balance and logits: NULL without a router, where chosen is not read. */
void forward(const int64_t *dims, REAL *scratch, void *start, const REAL *x, const REAL *first,
             const REAL *second, const REAL *router, const REAL *balance, const int64_t *experts, REAL *y,
             REAL *logits, int64_t *chosen) {
    call c = {.x = x, .first = first, .second = second, .router = router, .balance = balance,
              .experts = experts, .y = y, .logits = logits, .chosen = chosen, .start = (gomp)start};
    prepare(&c, dims, 0, scratch);
    if (c.s.T * c.s.k <= FEW) {
        forward_few(&c);
        return;
    }
    parallel(&c, c.s.E * (c.s.g + c.s.f) + c.s.routed, pack);
    parallel(&c, c.s.slots, forward_slot);
}

void backward(const int64_t *dims, REAL *scratch, void *start, const REAL *dy, const REAL *dlogits,
              const REAL *x, const REAL *first, const REAL *second, const REAL *router,
              const int64_t *experts, const REAL *logits, const int64_t *chosen, REAL *dx, REAL *dfirst,
              REAL *dsecond, REAL *drouter) {
    call c = {.x = x, .first = first, .second = second, .router = router, .experts = experts, .dy = dy,
              .dlogits = dlogits, .logits = (REAL *)logits, .chosen = (int64_t *)chosen, .dx = dx,
              .dfirst = dfirst, .dsecond = dsecond, .drouter = drouter, .start = (gomp)start};
    prepare(&c, dims, 1, scratch);
    const int64_t items = c.s.E * (c.s.g + c.s.f) + c.s.routed;
    parallel(&c, c.s.E * c.s.g, pack);   /* the first cores alone, for z */
    parallel(&c, c.s.slots, backward_slot);
    parallel(&c, items, reduce);
}
