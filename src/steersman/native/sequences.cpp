// Attention of whole sequences, forward and backward, float32 throughout; tests/native/test_sequences.py holds it to
// plain torch.
//
// Sequences of a few hundred tokens have too little in them for a library's large products. Here one thread takes one
// head of keys at a time: a few queries against all keys they see, their exact softmax, and the sum of values; all of it
// stays in the caches. Nothing of size T x T is kept for the backward pass, which makes the weights again.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "products.h"
#include "softmax.h"
#include "turn.h"

extern "C" {

// A tensor [batch, heads, tokens, width]: its strides in elements; the numbers of one token lie side by side.
struct Strided {
    float* at;
    int64_t batch, head, token;
};

struct Sequences {
    Strided query, key, value, out, grad_out, grad_query, grad_key, grad_value;
    float* sums;  // [batch, heads, queries, 2]: largest score and 1 / sum of exponentials, kept for the backward pass
    const uint8_t* mask;  // [batch, 1, queries, keys], 1 where a key is seen; null: query i sees keys to i + keys - queries
    int64_t mask_batch, mask_query;
    int64_t batch, heads, kv_heads, queries, keys, width;
    // [rows + 1] where a batch of 1 holds rows one behind the other: row r has the queries from query_starts[r] to
    // query_starts[r + 1], and keys likewise, and sees only itself; null: the batch's rows are rows
    const int64_t *query_starts, *key_starts;
    int64_t rows;
    float scale;
};
}

namespace {

constexpr int64_t TOGETHER = 32;  // queries whose weights are kept at once in the backward pass

inline float* head_of(const Strided& x, int64_t batch, int64_t head) { return x.at + batch * x.batch + head * x.head; }

// out[r][c] (+)= sum over k of x[r * row + k * step] * w[k * w_step + c], for R rows and 16 V columns
template <int R, int V>
inline void outer(const float* x, int64_t row, int64_t step, const float* w, int64_t w_step, int64_t depth, bool add,
                  float* out, int64_t out_row) {
    lanes sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < V; ++c) sum[r][c] = add ? load(out + r * out_row + 16 * c) : lanes{};
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
        lanes some[V];
        for (int c = 0; c < V; ++c) some[c] = load(w + k * w_step + 16 * c);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < V; ++c) sum[r][c] += x[r * row + k * step] * some[c];
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < V; ++c) store(out + r * out_row + 16 * c, sum[r][c]);
}

template <int V, int R = ROWS>
inline void outer_rows(int64_t rows, const float* x, int64_t row, int64_t step, const float* w, int64_t w_step,
                       int64_t depth, bool add, float* out, int64_t out_row) {
    if constexpr (R > 1) {
        if (rows < R) return outer_rows<V, R - 1>(rows, x, row, step, w, w_step, depth, add, out, out_row);
    }
    outer<R, V>(x, row, step, w, w_step, depth, add, out, out_row);
}

// The same for any number of rows, and of columns a multiple of 16.
void product_of(int64_t rows, int64_t columns, const float* x, int64_t row, int64_t step, const float* w, int64_t w_step,
                int64_t depth, bool add, float* out, int64_t out_row) {
    for (int64_t r = 0; r < rows; r += ROWS) {
        const int64_t some = std::min<int64_t>(ROWS, rows - r);
        int64_t c = 0;
        for (; c + PANEL <= columns; c += PANEL)
            outer_rows<VECTORS>(some, x + r * row, row, step, w + c, w_step, depth, add, out + r * out_row + c, out_row);
        for (; c < columns; c += 16)
            outer_rows<1>(some, x + r * row, row, step, w + c, w_step, depth, add, out + r * out_row + c, out_row);
    }
}

// Rows of `width` numbers that lie `step` apart, laid `to_step` apart.
void lay(const float* x, int64_t step, int64_t rows, int64_t width, float* to, int64_t to_step) {
    for (int64_t j = 0; j < rows; ++j)
        for (int64_t d = 0; d < width; d += 16) store(to + j * to_step + d, load(x + j * step + d));
}

// What one query sees: keys before `seen`, of these where `mask` is 1 or null.
struct View {
    const uint8_t* mask;
    int64_t seen;
};

View view_of(const Sequences& s, int64_t batch, int64_t query) {
    if (!s.mask) return {nullptr, std::clamp<int64_t>(query + 1 + s.keys - s.queries, 0, s.keys)};
    const uint8_t* mask = s.mask + batch * s.mask_batch + query * s.mask_query;
    int64_t seen = s.keys;
    while (seen > 0 && !mask[seen - 1]) --seen;
    return {mask, seen};
}

// The views of some queries; returns how many keys the one that sees most sees.
int64_t look(const Sequences& s, int64_t batch, int64_t first, int64_t queries, View* views) {
    int64_t seen = 0;
    for (int64_t r = 0; r < queries; ++r) {
        views[r] = view_of(s, batch, first + r);
        seen = std::max(seen, views[r].seen);
    }
    return seen;
}

// What a query does not see becomes minus infinity.
void hide(float* scores, View view, int64_t padded) {
    if (view.mask)
        for (int64_t j = 0; j < view.seen; ++j) scores[j] = view.mask[j] ? scores[j] : -INFINITY;
    std::fill(scores + view.seen, scores + padded, -INFINITY);
}

// The scores of a query become its weights, in place, 0 where it sees nothing.
void soften_row(float* scores, View view, float scale, int64_t padded, float* sums) {
    hide(scores, view, padded);
    sums[0] = view.seen ? largest(scores, padded) : 0.0f;
    const float total = exponentials(scores, scale, sums[0], padded);
    sums[1] = view.seen ? 1.0f / total : 0.0f;
    multiply_row(scores, sums[1], padded);
}

void forward_of(const Sequences& s, int64_t batch, int64_t kv_head, std::vector<float>& memory) {
    const int64_t padded = padded_to(s.keys, PANEL), group = s.heads / s.kv_heads;
    memory.resize(padded * (2 * s.width + ROWS));
    float *turned = memory.data(), *value = turned + padded * s.width, *scores = value + padded * s.width;
    turn(head_of(s.key, batch, kv_head), s.key.token, s.keys, s.width, turned, padded);
    lay(head_of(s.value, batch, kv_head), s.value.token, s.keys, s.width, value, s.width);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const float* query = head_of(s.query, batch, head);
        float* out = head_of(s.out, batch, head);
        float* sums = s.sums + (batch * s.heads + head) * s.queries * 2;
        for (int64_t i = 0; i < s.queries; i += ROWS) {
            const int64_t rows = std::min<int64_t>(ROWS, s.queries - i);
            View views[ROWS];
            const int64_t seen = look(s, batch, i, rows, views);
            const int64_t wide = padded_to(seen, PANEL);
            product_of(rows, wide, query + i * s.query.token, s.query.token, 1, turned, padded, s.width, false, scores,
                       padded);
            for (int64_t r = 0; r < rows; ++r)
                soften_row(scores + r * padded, views[r], s.scale, wide, sums + 2 * (i + r));
            product_of(rows, s.width, scores, padded, 1, value, s.width, seen, false, out + i * s.out.token,
                       s.out.token);
        }
    }
}

// The weights of one query made again from its scores, and from the gradients of the weights those of the scores:
// weight (gradient - sum of weight gradient) scale, where that sum is grad_out . out.
void gradients_row(float* scores, float* gradients, View view, const float* sums, float sum, float scale,
                   int64_t padded) {
    hide(scores, view, padded);
    exponentials(scores, scale, sums[0], padded);
    multiply_row(scores, sums[1], padded);
    for (int64_t j = 0; j < padded; j += 16)
        store(gradients + j, load(scores + j) * (load(gradients + j) - sum) * scale);
}

void backward_of(const Sequences& s, int64_t batch, int64_t kv_head, std::vector<float>& memory) {
    const int64_t padded = padded_to(s.keys, PANEL), group = s.heads / s.kv_heads, width = s.width;
    const int64_t all = padded * width, some = TOGETHER * width;
    memory.resize(5 * all + 2 * some + 2 * TOGETHER * padded);
    float *key = memory.data(), *turned_key = key + all, *turned_value = turned_key + all, *grad_key = turned_value + all;
    float *grad_value = grad_key + all, *queries = grad_value + all, *grads = queries + some, *weights = grads + some;
    float* gradients = weights + TOGETHER * padded;
    std::fill(grad_key, grad_key + 2 * all, 0.0f);
    lay(head_of(s.key, batch, kv_head), s.key.token, s.keys, width, key, width);
    turn(key, width, s.keys, width, turned_key, padded);
    turn(head_of(s.value, batch, kv_head), s.value.token, s.keys, width, turned_value, padded);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const float *query = head_of(s.query, batch, head), *out = head_of(s.out, batch, head);
        const float *grad_out = head_of(s.grad_out, batch, head);
        const float* sums = s.sums + (batch * s.heads + head) * s.queries * 2;
        float* grad_query = head_of(s.grad_query, batch, head);
        for (int64_t i = 0; i < s.queries; i += TOGETHER) {
            const int64_t rows = std::min(TOGETHER, s.queries - i);
            View views[TOGETHER];
            const int64_t seen = look(s, batch, i, rows, views);
            const int64_t wide = padded_to(seen, PANEL);
            lay(query + i * s.query.token, s.query.token, rows, width, queries, width);
            lay(grad_out + i * s.grad_out.token, s.grad_out.token, rows, width, grads, width);
            product_of(rows, wide, queries, width, 1, turned_key, padded, width, false, weights, padded);
            product_of(rows, wide, grads, width, 1, turned_value, padded, width, false, gradients, padded);
            for (int64_t r = 0; r < rows; ++r) {
                const float *grad = grads + r * width, *there = out + (i + r) * s.out.token;
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t d = 0; d < width; ++d) sum += grad[d] * there[d];
                gradients_row(weights + r * padded, gradients + r * padded, views[r], sums + 2 * (i + r), sum, s.scale, wide);
            }
            product_of(rows, width, gradients, padded, 1, key, width, seen, false,
                       grad_query + i * s.grad_query.token, s.grad_query.token);
            product_of(seen, width, gradients, 1, padded, queries, width, rows, true, grad_key, width);
            product_of(seen, width, weights, 1, padded, grads, width, rows, true, grad_value, width);
        }
    }
    lay(grad_key, width, s.keys, width, head_of(s.grad_key, batch, kv_head), s.grad_key.token);
    lay(grad_value, width, s.keys, width, head_of(s.grad_value, batch, kv_head), s.grad_value.token);
}

// One of the rows that lie one behind the other, as a batch of its own.
Sequences row_of(const Sequences& s, int64_t row) {
    Sequences one = s;
    const int64_t query = s.query_starts[row], key = s.key_starts[row];
    for (Strided* x : {&one.query, &one.out, &one.grad_out, &one.grad_query}) x->at += query * x->token;
    for (Strided* x : {&one.key, &one.value, &one.grad_key, &one.grad_value}) x->at += key * x->token;
    one.sums += 2 * s.heads * query;
    one.queries = s.query_starts[row + 1] - query;
    one.keys = s.key_starts[row + 1] - key;
    return one;
}

template <typename Work>
void each_head(const Sequences& s, int threads, Work work) {
    const bool behind = s.query_starts != nullptr;
    const int64_t items = (behind ? s.rows : s.batch) * s.kv_heads;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> memory;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < items; ++i) {
            const int64_t row = i / s.kv_heads, head = i % s.kv_heads;
            if (behind)
                work(row_of(s, row), 0, head, memory);
            else
                work(s, row, head, memory);
        }
    }
}

}  // namespace

extern "C" {

void attend_forward(const Sequences* s, int threads) { each_head(*s, threads, forward_of); }

void attend_backward(const Sequences* s, int threads) { each_head(*s, threads, backward_of); }
}

extern "C" void sequences_sizes(int64_t* bytes) {
    bytes[0] = sizeof(Strided);
    bytes[1] = sizeof(Sequences);
}
