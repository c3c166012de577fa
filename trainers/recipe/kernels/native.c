/* Causal attention over packed rows in float32, forward and backward; compiled on the machine that it runs on.

   A row's queries are taken BLOCK at a time against all keys before them, so that the scores of a block stay in the
   cache. Every product is made of one kernel: a tile of TILE rows and CHUNK columns, held in registers. What belongs to
   one row and one head of keys is one thread's work, so gradients of keys add up without locks; those of a beginning
   that rows share are summed at the end, in the rows' order.

   Every function that is called from outside returns 0, or 1 where memory ran out: what it made is not to be used then. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, VECTORS = 4, DOTS = 8 };
#elif defined(__AVX2__)
enum { LANES = 8, VECTORS = 2, DOTS = 4 };
#else
enum { LANES = 4, VECTORS = 2, DOTS = 4 };
#endif
enum { TILE = 6, CHUNK = LANES * VECTORS, BLOCK = 48, FEW = 16 };

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
#define INLINE static inline __attribute__((always_inline))

/* A matrix that is read: element (row, column) at data[row * down + column * right]. */
typedef struct {
    const float *data;
    int64_t down, right;
} matrix;

/* c[r][0..vectors) (+)= sum over i of a(r, i) * b[i][0..vectors) for r < rows; both counts are known when compiled. */
INLINE void tile(const int rows, const int vectors, int64_t depth, matrix a, const float *b, int64_t b_down, float *c,
                 int64_t c_down, int add) {
    vector sums[TILE][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = add ? *(const vector *)(c + r * c_down + v * LANES) : (vector){0};
    for (int64_t i = 0; i < depth; i++) {
        vector line[VECTORS];
        for (int v = 0; v < vectors; v++) line[v] = *(const vector *)(b + i * b_down + v * LANES);
        for (int r = 0; r < rows; r++) {
            const float factor = a.data[r * a.down + i * a.right];
            for (int v = 0; v < vectors; v++) sums[r][v] += factor * line[v];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) *(vector *)(c + r * c_down + v * LANES) = sums[r][v];
}

INLINE void tile_of(int rows, const int vectors, int64_t depth, matrix a, const float *b, int64_t b_down, float *c,
                    int64_t c_down, int add) {
    switch (rows) {
    case 1: tile(1, vectors, depth, a, b, b_down, c, c_down, add); break;
    case 2: tile(2, vectors, depth, a, b, b_down, c, c_down, add); break;
    case 3: tile(3, vectors, depth, a, b, b_down, c, c_down, add); break;
    case 4: tile(4, vectors, depth, a, b, b_down, c, c_down, add); break;
    case 5: tile(5, vectors, depth, a, b, b_down, c, c_down, add); break;
    default: tile(TILE, vectors, depth, a, b, b_down, c, c_down, add);
    }
}

/* c (+)= a · b for up to TILE rows and a number of columns that LANES divides. */
static void product(int rows, int64_t columns, int64_t depth, matrix a, const float *b, int64_t b_down, float *c,
                    int64_t c_down, int add) {
    int64_t at = 0;
    for (; at + CHUNK <= columns; at += CHUNK)
        tile_of(rows, VECTORS, depth, a, b + at, b_down, c + at, c_down, add);
    for (; at < columns; at += LANES) tile_of(rows, 1, depth, a, b + at, b_down, c + at, c_down, add);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t padded(int64_t count) { return (count + CHUNK - 1) / CHUNK * CHUNK; }

/* to [width][padded(length)] = from [length][width] transposed, and zeros after it. */
static void transpose(const float *from, int64_t length, int64_t width, float *to) {
    const int64_t wide = padded(length);
    for (int64_t w = 0; w < width; w++) {
        for (int64_t i = 0; i < length; i++) to[w * wide + i] = from[i * width + w];
        for (int64_t i = length; i < wide; i++) to[w * wide + i] = 0;
    }
}

/* One of query, key, value, out and their gradients: where a head begins, and where the next token is. */
typedef struct {
    float *data;
    int64_t head, token;
} states;

static float *place(states s, int64_t head, int64_t token) { return s.data + head * s.head + token * s.token; }

/* A packed row: `length` tokens, the beginning of which, `shared` of them, are the first tokens of all; the others stand
   from `start` on, which is no less than `shared`. */
typedef struct {
    int64_t shared, start, length;
} row;

/* The `number`th row; after the last one comes the beginning that they share, as a row of its own. */
static row row_of(const int32_t *offsets, int64_t rows, int64_t number) {
    if (number == rows) return (row){0, 0, offsets[0]};
    return (row){offsets[0], offsets[number], offsets[0] + offsets[number + 1] - offsets[number]};
}

static int64_t tasks_of(const int32_t *offsets, int64_t rows, int64_t kv_heads) {
    return (rows + (offsets[0] > 0)) * kv_heads;
}

/* to [length][width] = the states of one head for all tokens of a row. */
static void collect(states s, int64_t head, row r, int64_t width, float *to) {
    for (int64_t i = 0; i < r.length; i++)
        memcpy(to + i * width, place(s, head, i < r.shared ? i : r.start - r.shared + i), sizeof(float) * width);
}

/* scores[i - from][0..to) = left(i) · right for the tokens from..to of a row; those after i are not made or left. */
static void scores_of(const float *left, int64_t down, const float *right, int64_t wide, int64_t width, int64_t from,
                      int64_t to, float *scores) {
    for (int64_t i = from; i < to; i += TILE) {
        const int64_t end = least(i + TILE, to);
        product((int)(end - i), least(wide, padded(end)), width, (matrix){left + i * down, down, 1}, right, wide,
                scores + (i - from) * wide, wide, 0);
    }
}

/* out(i) = weights(i) · right for the tokens from..to, by the tokens up to each tile's last; weights are 0 after i. */
static void mix(const float *weights, int64_t wide, const float *right, int64_t down, int64_t width, int64_t from,
                int64_t to, float *out, int64_t out_down, int add) {
    for (int64_t i = from; i < to; i += TILE) {
        const int64_t end = least(i + TILE, to);
        product((int)(end - i), width, end, (matrix){weights + (i - from) * wide, wide, 1}, right, down,
                out + i * out_down, out_down, add);
    }
}

/* out(j) += sum over the tokens i in from..to of weights(i, j) * left(i), for every j below to. */
static void gather(const float *weights, int64_t wide, const float *left, int64_t down, int64_t width, int64_t from,
                   int64_t to, float *out, int64_t out_down) {
    for (int64_t j = 0; j < to; j += TILE) {
        const int64_t first = j > from ? j : from;
        product((int)(least(j + TILE, to) - j), width, to - first, (matrix){weights + (first - from) * wide + j, 1, wide},
                left + first * down, down, out + j * out_down, out_down, 1);
    }
}

/* exp(x) for x below 88, to 2 units in the last place, in operations that become vectors (Cephes' polynomial). */
INLINE float exponential(float x) {
    const float clamped = x < -87 ? -87 : x, power = rintf(clamped * 1.44269504f);
    const float rest = clamped - power * 0.693359375f + power * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1;
    const int32_t bits = ((int32_t)power + 127) << 23;
    float two_to_power;
    memcpy(&two_to_power, &bits, sizeof bits);
    return sum * two_to_power;
}

/* weights[0..count) = exp(scale * weights - shift), 0 from there to the end of the tile; their sum. */
static float exponentials(float *weights, int64_t count, int64_t end, float scale, float shift) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) {
        weights[j] = exponential(scale * weights[j] - shift);
        sum += weights[j];
    }
    for (int64_t j = count; j < end; j++) weights[j] = 0;
    return sum;
}

/* 1 where memory ran out, as `backward_row`. */
static int forward_row(states q, states k, states v, states out, float *logsumexp, row r, int64_t kv_head,
                       int64_t heads, int64_t group, int64_t width, float scale) {
    const int64_t wide = padded(r.length), base = r.start - r.shared;
    float *keys = malloc(sizeof(float) * (2 * width + BLOCK) * wide);
    if (keys == NULL) return 1;
    float *values = keys + width * wide, *scores = values + width * wide;
    collect(k, kv_head, r, width, values);
    transpose(values, r.length, width, keys);
    collect(v, kv_head, r, width, values);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const float *queries = place(q, head, base);
        float *outs = place(out, head, base);
        for (int64_t from = r.shared; from < r.length; from += BLOCK) {
            const int64_t to = least(from + BLOCK, r.length);
            float shares[BLOCK];
            scores_of(queries, q.token, keys, wide, width, from, to, scores);
            for (int64_t i = from; i < to; i++) {
                float *line = scores + (i - from) * wide, highest = line[0];
#pragma omp simd reduction(max : highest)
                for (int64_t j = 1; j <= i; j++) highest = line[j] > highest ? line[j] : highest;
                const float sum = exponentials(line, i + 1, to, scale, scale * highest);
                logsumexp[(base + i) * heads + head] = scale * highest + logf(sum);
                shares[i - from] = 1 / sum;
            }
            mix(scores, wide, values, width, width, from, to, outs, out.token, 0);
            for (int64_t i = from; i < to; i++)
                for (int64_t w = 0; w < width; w++) outs[i * out.token + w] *= shares[i - from];
        }
    }
    free(keys);
    return 0;
}

/* The gradients of what the row shares go to `shared_k` and `shared_v`, [shared][width]. */
static int backward_row(states q, states k, states v, states out, states grad, const float *logsumexp, states grad_q,
                        states grad_k, states grad_v, float *shared_k, float *shared_v, row r, int64_t kv_head,
                        int64_t heads, int64_t group, int64_t width, float scale) {
    const int64_t wide = padded(r.length), base = r.start - r.shared, size = width * wide;
    float *keys = malloc(sizeof(float) * (5 * size + 2 * BLOCK * wide));
    if (keys == NULL) return 1;
    float *keys_across = keys + size;
    float *values_across = keys + 2 * size, *to_keys = keys + 3 * size, *to_values = keys + 4 * size;
    float *weights = keys + 5 * size, *grads = weights + BLOCK * wide;
    collect(v, kv_head, r, width, keys);
    transpose(keys, r.length, width, values_across);
    collect(k, kv_head, r, width, keys);
    transpose(keys, r.length, width, keys_across);
    memset(to_keys, 0, sizeof(float) * 2 * size);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const float *queries = place(q, head, base), *outs = place(out, head, base), *given = place(grad, head, base);
        for (int64_t from = r.shared; from < r.length; from += BLOCK) {
            const int64_t to = least(from + BLOCK, r.length);
            scores_of(queries, q.token, keys_across, wide, width, from, to, weights);
            scores_of(given, grad.token, values_across, wide, width, from, to, grads);
            for (int64_t i = from; i < to; i++) {
                float *weight = weights + (i - from) * wide, *line = grads + (i - from) * wide, along = 0;
#pragma omp simd reduction(+ : along)
                for (int64_t w = 0; w < width; w++) along += outs[i * out.token + w] * given[i * grad.token + w];
                exponentials(weight, i + 1, to, scale, logsumexp[(base + i) * heads + head]);
#pragma omp simd
                for (int64_t j = 0; j < to; j++) line[j] = j <= i ? scale * weight[j] * (line[j] - along) : 0;
            }
            mix(grads, wide, keys, width, width, from, to, place(grad_q, head, base), grad_q.token, 0);
            gather(weights, wide, given, grad.token, width, from, to, to_values, width);
            gather(grads, wide, queries, q.token, width, from, to, to_keys, width);
        }
    }
    memcpy(shared_k, to_keys, sizeof(float) * r.shared * width);
    memcpy(shared_v, to_values, sizeof(float) * r.shared * width);
    for (int64_t i = r.shared; i < r.length; i++) {
        memcpy(place(grad_k, kv_head, base + i), to_keys + i * width, sizeof(float) * width);
        memcpy(place(grad_v, kv_head, base + i), to_values + i * width, sizeof(float) * width);
    }
    free(keys);
    return 0;
}

/* `places` are head and token strides of q, k, v and out; `logsumexp` is [tokens][heads]. LANES divides `width`. */
int forward(const int64_t *places, float *q, float *k, float *v, float *out, float *logsumexp, const int32_t *offsets,
            int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, float scale, int threads) {
    const states all[4] = {{q, places[0], places[1]}, {k, places[2], places[3]}, {v, places[4], places[5]},
                           {out, places[6], places[7]}};
    int ran_out = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(| : ran_out)
    for (int64_t task = 0; task < tasks_of(offsets, rows, kv_heads); task++)
        ran_out |= forward_row(all[0], all[1], all[2], all[3], logsumexp, row_of(offsets, rows, task / kv_heads),
                               task % kv_heads, heads, heads / kv_heads, width, scale);
    return ran_out;
}

/* As `forward`; `places` go on with grad, grad_q, grad_k and grad_v. */
int backward(const int64_t *places, float *q, float *k, float *v, float *out, float *logsumexp, float *grad,
             float *grad_q, float *grad_k, float *grad_v, const int32_t *offsets, int64_t rows, int64_t heads,
             int64_t kv_heads, int64_t width, float scale, int threads) {
    float *data[8] = {q, k, v, out, grad, grad_q, grad_k, grad_v};
    const int64_t tasks = tasks_of(offsets, rows, kv_heads), size = offsets[0] * width;
    states all[8];
    for (int s = 0; s < 8; s++) all[s] = (states){data[s], places[2 * s], places[2 * s + 1]};
    float *shared_k = malloc(sizeof(float) * 2 * tasks * size + 1);
    if (shared_k == NULL) return 1;
    float *shared_v = shared_k + tasks * size;
    int ran_out = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(| : ran_out)
    for (int64_t task = 0; task < tasks; task++)
        ran_out |= backward_row(all[0], all[1], all[2], all[3], all[4], logsumexp, all[5], all[6], all[7],
                                shared_k + task * size, shared_v + task * size, row_of(offsets, rows, task / kv_heads),
                                task % kv_heads, heads, heads / kv_heads, width, scale);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < (ran_out ? 0 : offsets[0]); i++)
        for (int64_t task = 0; task < rows * kv_heads; task++) {
            float *to_k = place(all[6], task % kv_heads, i), *to_v = place(all[7], task % kv_heads, i);
            for (int64_t w = 0; w < width; w++) {
                to_k[w] += shared_k[task * size + i * width + w];
                to_v[w] += shared_v[task * size + i * width + w];
            }
        }
    free(shared_k);
    return ran_out;
}

/* narrow[token][0..ranks) = x[token] · a[0..ranks) for `tokens` tokens; both counts are known when compiled. */
INLINE void dots(const int tokens, const int ranks, int64_t columns, const float *x, const float *a, float *narrow,
                 int64_t rank) {
    vector sums[2][DOTS] = {0};
    for (int64_t i = 0; i < columns; i += LANES)
        for (int r = 0; r < ranks; r++)
            for (int t = 0; t < tokens; t++)
                sums[t][r] += *(const vector *)(x + t * columns + i) * *(const vector *)(a + r * columns + i);
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ranks; r++) {
            float sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += sums[t][r][lane];
            narrow[t * rank + r] = sum;
        }
}

static void narrow_some(float *narrow, const float *x, const float *a, int64_t tokens, int64_t rank, int64_t columns) {
    for (int64_t t = 0; t < tokens; t += 2) {
        int64_t r = 0;
        for (; r + DOTS <= rank && t + 2 <= tokens; r += DOTS)
            dots(2, DOTS, columns, x + t * columns, a + r * columns, narrow + t * rank + r, rank);
        for (int64_t one = t; one < least(t + 2, tokens); one++)
            for (int64_t rest = r; rest < rank; rest++)
                dots(1, 1, columns, x + one * columns, a + rest * columns, narrow + one * rank + rest, rank);
    }
}

/* narrow [tokens][rank] = x [tokens][columns] · a [rank][columns], transposed. LANES divides `columns`. */
int narrow_down(float *narrow, const float *x, const float *a, int64_t tokens, int64_t rank, int64_t columns,
                int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t += FEW)
        narrow_some(narrow + t * rank, x + t * columns, a, least(FEW, tokens - t), rank, columns);
    return 0;
}

/* y [tokens][columns] += narrow [tokens][rank] · wide [rank][columns]. LANES divides `columns`. */
int add_widened(float *y, const float *narrow, const float *wide, int64_t tokens, int64_t rank, int64_t columns,
                int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < tokens; i += TILE)
        product((int)least(TILE, tokens - i), columns, rank, (matrix){narrow + i * rank, rank, 1}, wide, columns,
                y + i * columns, columns, 1);
    return 0;
}

/* sum [rank][columns] = low [tokens][rank], transposed, · x [tokens][columns]; and, where `a` is given, on the same way
   through x, narrow [tokens][rank] = x · a [rank][columns], transposed. LANES divides `columns`. */
int sum_over_tokens(float *sum, const float *low, const float *x, float *narrow, const float *a, int64_t tokens,
                    int64_t rank, int64_t columns, int threads) {
    const int64_t size = rank * columns, share = (tokens + threads - 1) / threads;
    float *sums = calloc(threads * size, sizeof(float));
    if (sums == NULL) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++)
        for (int64_t t = thread * share; t < least(tokens, (thread + 1) * share); t += FEW) {
            const int64_t count = least(FEW, least(tokens, (thread + 1) * share) - t);
            if (a != NULL) narrow_some(narrow + t * rank, x + t * columns, a, count, rank, columns);
            for (int64_t r = 0; r < rank; r += TILE)
                product((int)least(TILE, rank - r), columns, count, (matrix){low + t * rank + r, 1, rank}, x + t * columns,
                        columns, sums + thread * size + r * columns, columns, 1);
        }
    for (int64_t i = 0; i < size; i++) {
        sum[i] = sums[i];
        for (int64_t thread = 1; thread < threads; thread++) sum[i] += sums[thread * size + i];
    }
    free(sums);
    return 0;
}
