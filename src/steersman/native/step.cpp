// One step of decoding by a whole Llama-style model, and the products it is made of.
//
// Each live row is fed one token; its keys and values go into the cache's current column, and the logits of the next
// token come out. All threads go through the model together and wait for one another between its parts. float32
// throughout; tests/rollout/test_compiled_step.py holds it to the model's own modules.

#include <omp.h>

#include <cstdint>
#include <vector>

#include "attention.h"
#include "products.h"
#include "rows.h"
#include "turn.h"

extern "C" {

// Weights of matrices are rearranged (`rearrange`); what a model doesn't have is null.
struct Layer {
    const float *norm, *query, *key, *value, *query_bias, *key_bias, *value_bias, *query_norm, *key_norm, *out,
        *out_bias, *inner_norm, *gate, *up, *down;
    float *keys, *values;  // the cache: [slots, kv_heads, columns, width]
    int64_t first;         // the first column that this layer sees
};

struct Model {
    const Layer* parts;
    const float *embedding, *norm, *head, *cosine, *sine;  // the last two [positions, width]
    int64_t layers, hidden, heads, kv_heads, width, inner, vocabulary, columns;
    float eps, scale;
    int64_t gelu;
};

// Scratch: x and h [rows, hidden], projected [rows, (heads + 2 kv_heads) width], mixed [rows, heads width],
// opened [rows, inner].
struct Now {
    const int64_t *ids, *positions;
    const int64_t *order, *start, *leader, *until;  // the rows as attention takes them, and what it knows of each
    float *x, *h, *projected, *mixed, *opened, *logits;
    int64_t rows, column;
};
}

namespace {

void norm_rows(const Model& m, const Now& now, const float* weight, Range mine) {
    for (int64_t r = mine.from; r < mine.to; ++r)
        norm_row(now.x + r * m.hidden, weight, 0.0f, m.eps, now.h + r * m.hidden, m.hidden);
}

struct Projected {
    float *query, *key, *value;
    int64_t queries, kv;  // numbers per row
};

Projected projected(const Model& m, const Now& now) {
    const int64_t queries = m.heads * m.width, kv = m.kv_heads * m.width;
    float* key = now.projected + now.rows * queries;
    return {now.projected, key, key + now.rows * kv, queries, kv};
}

void attend_share(const Model& m, const Layer& layer, const Now& now, Range mine, float* scores) {
    const Projected p = projected(m, now);
    const int64_t head_size = m.columns * m.width, row_size = m.kv_heads * head_size, group = m.heads / m.kv_heads;
    const Heads keys{layer.keys + layer.first * m.width, row_size, head_size, m.width};
    const Heads values{layer.values + layer.first * m.width, row_size, head_size, m.width};
    const Attention a{p.query, p.queries, keys, values, nullptr, 0, now.mixed, now.rows, m.heads, m.kv_heads,
                      now.column + 1 - layer.first, m.scale, now.start, layer.first, now.leader, now.until};
    const Attend attend = attend_for(m.width, m.width);
    // head by head, rows that share columns one after another
    const auto item_at = [&](int64_t i) { return Item{now.order[i % now.rows], i / now.rows}; };
    for (int64_t i = mine.from; i < mine.to; ++i) {
        const Item item = item_at(i);
        const int64_t row = item.row, head = item.head;
        const float *cosine = m.cosine + now.positions[row] * m.width, *sine = m.sine + now.positions[row] * m.width;
        float* query = p.query + row * p.queries + head * group * m.width;
        for (int64_t g = 0; g < group; ++g, query += m.width) {
            if (layer.query_norm) norm_row(query, layer.query_norm, 0.0f, m.eps, query, m.width);
            rotate_row(query, cosine, sine, query, m.width / 2);
        }
        float* key = p.key + row * p.kv + head * m.width;
        if (layer.key_norm) norm_row(key, layer.key_norm, 0.0f, m.eps, key, m.width);
        const int64_t place = row * row_size + head * head_size + now.column * m.width;
        rotate_row(key, cosine, sine, layer.keys + place, m.width / 2);
        std::copy_n(p.value + row * p.kv + head * m.width, m.width, layer.values + place);
        attend(a, item, item_at(std::min(i + 1, mine.to - 1)), scores);
    }
}

void run_layer(const Model& m, const Layer& layer, const Now& now, int64_t t, int64_t threads, float* scores) {
    const Range rows = share(now.rows, t, threads);
    const Rows h{now.h, now.rows, m.hidden, m.hidden};
    const Projected p = projected(m, now);
    norm_rows(m, now, layer.norm, rows);
#pragma omp barrier
    multiply<false>(h, layer.query, layer.query_bias, p.query, p.queries, t, threads);
    multiply<false>(h, layer.key, layer.key_bias, p.key, p.kv, t, threads);
    multiply<false>(h, layer.value, layer.value_bias, p.value, p.kv, t, threads);
#pragma omp barrier
    attend_share(m, layer, now, share(now.rows * m.kv_heads, t, threads), scores);
#pragma omp barrier
    multiply<true>({now.mixed, now.rows, p.queries, p.queries}, layer.out, layer.out_bias, now.x, m.hidden, t, threads);
#pragma omp barrier
    norm_rows(m, now, layer.inner_norm, rows);
#pragma omp barrier
    if (m.gelu)
        multiply_gated(h, layer.gate, layer.up, now.opened, m.inner, t, threads,
                       [](float x) { return activation<true>(x); });
    else
        multiply_gated(h, layer.gate, layer.up, now.opened, m.inner, t, threads,
                       [](float x) { return activation<false>(x); });
#pragma omp barrier
    multiply<true>({now.opened, now.rows, m.inner, m.inner}, layer.down, nullptr, now.x, m.hidden, t, threads);
#pragma omp barrier
}

}  // namespace

extern "C" {

// How many outputs one panel has.
int64_t panel_width() { return PANEL; }

// weights [outputs, inputs] into panels of PANEL outputs, the last one filled up with zeros
void rearrange(const float* weights, float* to, int64_t outputs, int64_t inputs, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < panels_of(outputs); ++panel)
        turn(weights + panel * PANEL * inputs, inputs, std::min(PANEL, outputs - panel * PANEL), inputs,
             to + panel * PANEL * inputs, PANEL);
}

// out [rows, outputs] = x [rows, inputs] weights^T + bias
void product(const float* x, const float* weights, const float* bias, float* out, int64_t rows, int64_t inputs,
             int64_t outputs, int threads) {
#pragma omp parallel num_threads(threads)
    multiply<false>({x, rows, inputs, inputs}, weights, bias, out, outputs, omp_get_thread_num(),
                    omp_get_num_threads());
}

void decode_step(const Model* model, const Now* at, int threads) {
    const Model& m = *model;
    const Now& now = *at;
#pragma omp parallel num_threads(threads)
    {
        const int64_t t = omp_get_thread_num(), all = omp_get_num_threads();
        const Range rows = share(now.rows, t, all);
        std::vector<float> scores(m.columns + 16);
        for (int64_t r = rows.from; r < rows.to; ++r)
            std::copy_n(m.embedding + now.ids[r] * m.hidden, m.hidden, now.x + r * m.hidden);
        for (int64_t i = 0; i < m.layers; ++i) run_layer(m, m.parts[i], now, t, all, scores.data());
        norm_rows(m, now, m.norm, rows);
#pragma omp barrier
        multiply<false>({now.h, now.rows, m.hidden, m.hidden}, m.head, nullptr, now.logits, m.vocabulary, t, all);
    }
}
}

extern "C" void step_sizes(int64_t* bytes) {
    bytes[0] = sizeof(Layer);
    bytes[1] = sizeof(Model);
    bytes[2] = sizeof(Now);
}
