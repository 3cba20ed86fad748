// The recurrence of an LSTM layer with its weights on the chip: one launch walks through all steps.
//
// Every block keeps its part of the recurrent weights R (4H x H) in registers, and in shared memory what does not fit
// there. Blocks exchange vectors through the L2 cache, and the flag is the data: a place that is not yet written holds
// EMPTY, a NaN that no computation gives, so a reader simply loads until no word is EMPTY. There are places for SLOTS steps, for
// more would leave the cache: who has what was made of all vectors of a step knows that all blocks have read those of the step
// before, and makes its own words of them EMPTY again, SLOTS - 2 steps before they are written anew (no fence orders these stores, for
// it would cost a trip a step: what does is a step's time, thousands of cycles). The words of the ring of partial sums
// carry a bit that tells one use of a place from the next.
//
// forward: a block owns UNITS units, computes their 4 * UNITS gates from the whole of h, and publishes their new h.
// backward: block (i, j) multiplies the gradients of the gates of ROW_UNITS units by the weights to COLUMNS units of h;
// the sums over i are ring-buffered, and each block turns its share of them into gradients of gates.
//
// The products are those of 16 x 8 x 16 tiles: weights are the matrix of 16 rows, the batch has the 8 columns. The sum
// over k may take k in any order, so each lane loads 8 neighbours in 16 bytes and calls them what the tiles want. Row i of
// a tile is row 2 i of the product, row i + 8 is row 2 i + 1: what a lane has of a tile are neighbours too.
//
// Compiled at run time with the sizes as macros: H (a multiple of 16), BATCH, PARTS, GROUPS, GROUP_BATCH, TILES_N, WARPS,
// SLOTS (a power of 2, 4 or more), HALF (fp16 instead of bf16); forward: UNITS, BLOCKS_K, REGISTERS_K; backward: ROW_UNITS, COLUMNS, BLOCKS_K, REGISTERS_K; PACE or not.
// Batch rows are worked on in GROUPS groups of GROUP_BATCH rows, so that one group's exchange hides behind another's work. Where a
// part of the blocks can hold all weights, PARTS such parts have groups of their own, and nothing to do with each other.

// acc += weights * vectors for block k of this warp's share. `weights` are the fragments kept in registers, `more` those in
// shared memory, 16 bytes a lane.
template <int TILES_M>
DEVICE void product(float (&acc)[TILES_M][TILES_N][4], const uint4 (&weights)[REGISTERS_K ? REGISTERS_K : 1][2][TILES_M],
                    const uint4* more, const uint4 (&vectors)[TILES_N], int k) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int m = 0; m < TILES_M; m++) {
            uint4 a = k < REGISTERS_K ? weights[k < REGISTERS_K ? k : 0][half][m]
                                      : more[(((k - REGISTERS_K) * 2 + half) * TILES_M + m) * 32];
#pragma unroll
            for (int n = 0; n < TILES_N; n++) {
                uint4 b = vectors[n];
                multiply(acc[m][n], a.x, a.y, a.z, a.w, half ? b.z : b.x, half ? b.w : b.y);
            }
        }
    }
}

// The warp's sums to shared memory, as [column n][row m] with rows of LENGTH floats.
template <int TILES_M, int LENGTH>
DEVICE void put_sums(float* sums, const float (&acc)[TILES_M][TILES_N][4], int lane) {
    const int r = lane >> 2, q = lane & 3;
#pragma unroll
    for (int m = 0; m < TILES_M; m++)
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                *(float2*)(sums + (n * 8 + 2 * q + e) * LENGTH + m * 16 + 2 * r) = make_float2(acc[m][n][e], acc[m][n][e + 2]);
}

// The sum over COUNT warps' sums of four neighbouring rows m of column n.
template <int COUNT, int LENGTH>
DEVICE float4 sum_of_warps(const float* sums, int n, int m) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < COUNT; w++) {
        float4 part = *(const float4*)(sums + (w * TILES_N * 8 + n) * LENGTH + m);
        total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    return total;
}

// acc = weights * vectors over this warp's share of k, of which bit k of `present` says whether this lane has any of block k, and
// whose words for this lane begin at `from`; `rows` tiles of batch rows are there for it. Waits for words that are EMPTY, block by
// block. `then` is called when all are there: loads asked for before would be waited for with them, or even before they are.
template <int TILES_M, class Then>
DEVICE void product_of_arriving(float (&acc)[TILES_M][TILES_N][4],
                                const uint4 (&weights)[REGISTERS_K ? REGISTERS_K : 1][2][TILES_M], const uint4* more,
                                const T16* from, unsigned present, int rows, Patience& patience, Pace& pace,
                                Then then) {
    bool too_early = false;
    uint4 vectors[BLOCKS_K][TILES_N];
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++)
#pragma unroll
        for (int n = 0; n < TILES_N; n++) {
            vectors[k][n] = make_uint4(0, 0, 0, 0);
            reload_shared_words(vectors[k][n], from + (k * TILES_N + n) * 256, n < rows && present >> k & 1);
        }
    patience.renew();
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
        for (;;) {
            bool waits = false;
#pragma unroll
            for (int n = 0; n < TILES_N; n++) waits |= is_empty(vectors[k][n]);
            if (!any_lane(waits) || !any_lane(patience.lasts())) break;
            too_early = true;
#pragma unroll
            for (int later = k; later < BLOCKS_K; later++)
#pragma unroll
                for (int n = 0; n < TILES_N; n++)
                    reload_shared_words(vectors[later][n], from + (later * TILES_N + n) * 256, is_empty(vectors[later][n]));
        }
        if (k == BLOCKS_K - 1) then();
        product<TILES_M>(acc, weights, more, vectors[k], k);
    }
    pace.judge(too_early);
}

#ifdef UNITS  // ---- forward --------------------------------------------------------------------------------------------

#define TILES (UNITS / 4)
#define PART ((H + UNITS - 1) / UNITS)
#define STRIDE (16 * TILES + 4)
#define ITEMS (UNITS * GROUP_BATCH)
#define ROUNDS ((ITEMS + THREADS - 1) / THREADS)

// weights R (4H, H); b_ih, b_hh (4H); gates (T, BATCH, 4H): pre-activations without these, become the gates; h0, c0 (BATCH, H); y (1 + T, BATCH, H):
// h0 and h; x (SLOTS, PARTS GROUPS, VECTORS): the same to exchange, every word EMPTY before; c (1 + T, BATCH, H): c0 and c; h_last, c_last (BATCH, H) those of the last step.
// c0 has 16 bits if bit 0 of `is_short` is set, c_last if bit 1 is.
KERNEL forward(const T16* weights, const T16* b_ih, const T16* b_hh, T16* gates, const T16* h0, const void* c0, T16* x, T16* y,
               float* c, T16* h_last, void* c_last, int is_short, int T, int* trouble, unsigned long long limit) {
    SHARED(shared);
    const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, r = lane >> 2, q = lane & 3;
    const int unit0 = blockIdx.x % PART * UNITS, row0 = blockIdx.x / PART * GROUPS * GROUP_BATCH;
    T16* h = y + BATCH * H;
    x += (long long)(blockIdx.x / PART * GROUPS) * VECTORS;
    copy_words(y, h0, BATCH * H / 2, PART * PARTS);
    uint4* more = shared + warp * SHARED_K * 2 * TILES * 32 + lane;
    float* sums = (float*)(shared + WARPS * SHARED_K * 2 * TILES * 32);
    float4* bias = (float4*)(sums + 2 * WARPS * TILES_N * 8 * STRIDE);
    put_bias(bias, b_ih, b_hh, unit0);
    Patience patience = {limit, 0, trouble, 0};

    uint4 kept[REGISTERS_K ? REGISTERS_K : 1][2][TILES];
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
        const int column = (warp * BLOCKS_K + k) * 32 + q * 8;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            uint4 rows[2];  // units, of each its gates
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const int at = m * 16 + 2 * r + s, unit = unit0 + at / 4;
                rows[s] = load_words(weights + ((long long)(at % 4) * H + unit) * H + column, column < H && unit < H);
            }
            const uint4 first = make_uint4(rows[0].x, rows[1].x, rows[0].y, rows[1].y);
            const uint4 second = make_uint4(rows[0].z, rows[1].z, rows[0].w, rows[1].w);
            if (k < REGISTERS_K) {
                kept[k < REGISTERS_K ? k : 0][0][m] = first, kept[k < REGISTERS_K ? k : 0][1][m] = second;
            } else {
                more[((k - REGISTERS_K) * 2 * TILES + m) * 32] = first;
                more[(((k - REGISTERS_K) * 2 + 1) * TILES + m) * 32] = second;
            }
        }
    }

    // an item is a unit and a batch row
    unsigned input[ROUNDS][4], next_input[ROUNDS][4];  // as loaded: what depends on a load waits for it
    float cell[ROUNDS] = {}, next_cell[ROUNDS];
    auto fetch = [&](int turn) {  // what a turn needs of memory
        const int t = turn / GROUPS, g = turn % GROUPS;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int item = thread + i * THREADS, b = row0 + g * GROUP_BATCH + item / UNITS, unit = unit0 + item % UNITS;
            const bool there = item < ITEMS && b < BATCH && unit < H;
            const T16* place = gates + ((long long)t * BATCH + b) * 4 * H + unit;
#pragma unroll
            for (int gate = 0; gate < 4; gate++) next_input[i][gate] = there ? place[gate * H] : 0;
            if (t == 0 || GROUPS > 1) next_cell[i] = there ? c[((long long)t * BATCH + b) * H + unit] : 0.0f;
        }
    };
    auto take = [&](int turn) {
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
#pragma unroll
            for (int gate = 0; gate < 4; gate++) input[i][gate] = next_input[i][gate];
            if (turn < GROUPS || GROUPS > 1) cell[i] = next_cell[i];
        }
    };
    for (int g = 0; g < GROUPS; g++)
        for (int item = thread; item < ITEMS; item += THREADS) {
            const int b = row0 + g * GROUP_BATCH + item / UNITS, unit = unit0 + item % UNITS;
            if (b >= BATCH || unit >= H) continue;
            c[b * H + unit] = state_at(c0, b * H + unit, is_short);
            if (!(unit & 1)) store_shared_word(x + g * VECTORS + place_in_vectors(item / UNITS, unit), *(const unsigned*)(h0 + b * H + unit));
        }
    fetch(0), take(0);
    unsigned present = 0;
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) present |= ((warp * BLOCKS_K + k) * 32 + q * 8 < H) << k;
    int place_of[ROUNDS];  // of an item's h in the exchanged vectors
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int item = thread + i * THREADS;
        place_of[i] = place_in_vectors(item / UNITS, unit0 + item % UNITS);
    }
    Pace pace;

#pragma unroll 1
    for (int turn = 0; turn < T * GROUPS; turn++) {
        const int t = turn / GROUPS, g = turn % GROUPS;
        const T16* from = x + slot(t, g) + (warp * BLOCKS_K * TILES_N * 32 + lane) * 8;
        const int batch_rows = min(GROUP_BATCH, BATCH - row0 - g * GROUP_BATCH), rows = (batch_rows - r + 7) >> 3;
        float acc[TILES][TILES_N][4] = {};
        pace.hold(turn ? PACE : 0);
        product_of_arriving<TILES>(acc, kept, more, from, present, rows, patience, pace,
                                   [&] { if (turn + 1 < T * GROUPS) fetch(turn + 1); });
        float* place = sums + (turn & 1) * WARPS * TILES_N * 8 * STRIDE;
        put_sums<TILES, STRIDE>(place + warp * TILES_N * 8 * STRIDE, acc, lane);
        barrier();
        pace.begin();

        float gate_of[ROUNDS][4];
        unsigned word[ROUNDS];
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int item = thread + i * THREADS, n = item / UNITS, b = row0 + g * GROUP_BATCH + n, unit = unit0 + item % UNITS;
            const bool there = item < ITEMS && b < BATCH && unit < H;
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (item < ITEMS) sum = sum_of_warps<WARPS, STRIDE>(place, n, item % UNITS * 4);
            const float4 added = bias[item % UNITS];
            const float in = sigmoid(sum.x + widened(input[i][0]) + added.x);
            const float forget = sigmoid(sum.y + widened(input[i][1]) + added.y);
            const float value = tangent(sum.z + widened(input[i][2]) + added.z);
            const float out = sigmoid(sum.w + widened(input[i][3]) + added.w);
            cell[i] = forget * cell[i] + in * value;
            const float now = out * tangent(cell[i]), next = from_neighbour(now);
            word[i] = packed(now, next);
            if (there && !(item & 1) && t + 1 < T) store_shared_word(x + slot(t + 1, g) + place_of[i], word[i]);
            gate_of[i][0] = in, gate_of[i][1] = forget, gate_of[i][2] = value, gate_of[i][3] = out;
        }
        // others wait for x alone: the rest is written after it
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int item = thread + i * THREADS, b = row0 + g * GROUP_BATCH + item / UNITS, unit = unit0 + item % UNITS;
            if (item < ITEMS && b < BATCH && unit < H) {
                const long long at = ((long long)t * BATCH + b) * H + unit;
                c[at + BATCH * H] = cell[i];
                if (!(item & 1)) {
                    *(unsigned*)(h + at) = word[i];
                    if (t) store_shared_word(x + slot(t - 1, g) + place_of[i], EMPTY);
                }
#pragma unroll
                for (int gate = 0; gate < 4; gate++) gates[(at - unit) * 4 + gate * H + unit] = narrowed(gate_of[i][gate]);
            }
        }
        take(turn + 1);
    }
    for (int g = 0; g < GROUPS; g++)  // the last state: each thread copies what it wrote
        for (int item = thread; item < ITEMS; item += THREADS) {
            const int b = row0 + g * GROUP_BATCH + item / UNITS, unit = unit0 + item % UNITS;
            if (b < BATCH && unit < H) copy_last(h_last, c_last, is_short, y, c, T, b * H + unit);
        }
}

#else  // ---- backward --------------------------------------------------------------------------------------------------

#define TILES (COLUMNS / 16)
#define STRIDE (16 * TILES + 4)
#define PAIRS (COLUMNS / 2)
#define ROWS ((H + ROW_UNITS - 1) / ROW_UNITS)
#define ALL_COLUMNS ((H + COLUMNS - 1) / COLUMNS * COLUMNS)
#define PART (ALL_COLUMNS / COLUMNS * ROWS)
#define SHARE ((PAIRS * GROUP_BATCH + ROWS - 1) / ROWS)
#define ROUNDS ((SHARE + THREADS - 1) / THREADS)
#define RING 4

// weights R (4H, H); gates (T, BATCH, 4H) after their activation; c (1 + T, BATCH, H); d_h (T, BATCH, H) the gradient of h, d_hT, d_cT (BATCH, H) of the last state or null; d_gates (T, BATCH, 4H) of the pre-activations; x (SLOTS, PARTS GROUPS,
// VECTORS) the same to exchange, every word EMPTY before; d_h0, d_c0 (BATCH, H) of the first state; ring (RING, ROWS, BATCH, ALL_COLUMNS), EMPTY before.
KERNEL backward(const T16* weights, const T16* gates, const float* c, const T16* d_h, const T16* d_hT,
                const float* d_cT, T16* x, T16* d_gates, float* d_h0, float* d_c0, float* ring, int T, int* trouble,
                unsigned long long limit) {
    SHARED(shared);
    const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, r = lane >> 2, q = lane & 3;
    const int row = blockIdx.x % ROWS, column0 = blockIdx.x % PART / ROWS * COLUMNS, row_unit0 = row * ROW_UNITS;
    const int row0 = blockIdx.x / PART * GROUPS * GROUP_BATCH;
    x += (long long)(blockIdx.x / PART * GROUPS) * VECTORS;
    uint4* more = shared + warp * SHARED_K * 2 * TILES * 32 + lane;
    float* sums = (float*)(shared + WARPS * SHARED_K * 2 * TILES * 32);
    Patience patience = {limit, 0, trouble, 0};

    uint4 kept[REGISTERS_K ? REGISTERS_K : 1][2][TILES];
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
        const int chunk = (warp * BLOCKS_K + k) * 4 + q, unit = row_unit0 + chunk_unit(chunk);
        const bool inside = chunk < ROW_UNITS / 2 && unit < H;
        const T16* from = weights + ((long long)chunk_gate(chunk) * H + unit) * H;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            unsigned words[2][4];
            const int column = column0 + m * 16 + 2 * r;
#pragma unroll
            for (int e = 0; e < 4; e++) {  // two neighbouring units by two neighbouring columns
                const unsigned even = load_word(from + (2 * e) * H + column, inside && column < H);
                const unsigned odd = load_word(from + (2 * e + 1) * H + column, inside && column < H);
                words[0][e] = (even & 0xffff) | odd << 16, words[1][e] = even >> 16 | (odd & 0xffff0000u);
            }
            const uint4 first = make_uint4(words[0][0], words[1][0], words[0][1], words[1][1]);
            const uint4 second = make_uint4(words[0][2], words[1][2], words[0][3], words[1][3]);
            if (k < REGISTERS_K) {
                kept[k < REGISTERS_K ? k : 0][0][m] = first, kept[k < REGISTERS_K ? k : 0][1][m] = second;
            } else {
                more[((k - REGISTERS_K) * 2 * TILES + m) * 32] = first;
                more[(((k - REGISTERS_K) * 2 + 1) * TILES + m) * 32] = second;
            }
        }
    }

    // An item is a pair of units and a batch row; a block has a share of its columns' items. With d the gradient of h, the
    // gradient of c is d_cell + d * by_h; that of o's pre-activation d * by_o, and those of i, f, g that of c times by_c.
    float2 by_h[ROUNDS], by_o[ROUNDS], by_c[ROUNDS][3], forget[ROUNDS], d_above[ROUNDS], d_cell[ROUNDS];
    unsigned gates_of[ROUNDS][4], d_h_of[ROUNDS];
    float2 cell[ROUNDS], cell_before[ROUNDS];
    auto fetch = [&](int t, int g) {  // what the turn of group g at step t needs of memory
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int mine = thread + i * THREADS, item = row * SHARE + mine;
            const int b = row0 + g * GROUP_BATCH + item / PAIRS, unit = column0 + item % PAIRS * 2;
            if (mine >= SHARE || item >= PAIRS * GROUP_BATCH || b >= BATCH || unit >= H) continue;
            const long long at = ((long long)t * BATCH + b) * H + unit;
#pragma unroll
            for (int gate = 0; gate < 4; gate++)
                gates_of[i][gate] = *(const unsigned*)(gates + (at - unit) * 4 + gate * H + unit);
            d_h_of[i] = *(const unsigned*)(d_h + at);
            cell[i] = *(const float2*)(c + at + BATCH * H);
            cell_before[i] = *(const float2*)(c + at);
            if (t == T - 1) d_cell[i] = d_cT ? *(const float2*)(d_cT + b * H + unit) : make_float2(0.0f, 0.0f);
            else if (GROUPS > 1) d_cell[i] = *(const float2*)(d_c0 + b * H + unit);
        }
    };
    auto prepare = [&](int i) {
        float2 of[4];
#pragma unroll
        for (int gate = 0; gate < 4; gate++) of[gate] = unpacked(gates_of[i][gate]);
        d_above[i] = unpacked(d_h_of[i]);
#define EACH(x)                                                           \
    {                                                                     \
        const float tanh_c = tangent(cell[i].x);                          \
        by_h[i].x = of[3].x * (1.0f - tanh_c * tanh_c);                   \
        by_o[i].x = tanh_c * of[3].x * (1.0f - of[3].x);                  \
        by_c[i][0].x = of[2].x * of[0].x * (1.0f - of[0].x);              \
        by_c[i][1].x = cell_before[i].x * of[1].x * (1.0f - of[1].x);     \
        by_c[i][2].x = of[0].x * (1.0f - of[2].x * of[2].x);              \
        forget[i].x = of[1].x;                                            \
    }
        EACH(x)
        EACH(y)
#undef EACH
    };
    fetch(T - 1, 0);
    unsigned present = 0;
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
        const int chunk = (warp * BLOCKS_K + k) * 4 + q;
        present |= (chunk < ROW_UNITS / 2 && row_unit0 + chunk_unit(chunk) < H) << k;
    }
    int place_of[ROUNDS];  // of an item's gradient of gate i in the exchanged vectors
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int item = row * SHARE + thread + i * THREADS;
        place_of[i] = place_in_vectors(item / PAIRS, column0 + item % PAIRS * 2, 0);
    }
    Pace pace;

    int turn = 0;
    for (int t = T - 1; t >= -1; t--) {
        // the gradients of h from step t + 1, and the share of the gates' gradients of step t
#pragma unroll 1
        for (int g = 0; g < GROUPS; g++) {
#pragma unroll
            for (int i = 0; i < ROUNDS; i++) {
                const int mine = thread + i * THREADS, item = row * SHARE + mine;
                const int b = row0 + g * GROUP_BATCH + item / PAIRS, unit = column0 + item % PAIRS * 2;
                if (mine >= SHARE || item >= PAIRS * GROUP_BATCH || b >= BATCH || unit >= H) continue;
                float2 d = make_float2(0.0f, 0.0f);
                if (t == T - 1) {
                    prepare(i);
                    if (d_hT) d = unpacked(*(const unsigned*)(d_hT + b * H + unit));
                } else {
                    const int use = T - 2 - t;
                    const unsigned bit = (use / RING) & 1;
                    const float* from = ring + ((long long)(use % RING) * ROWS * BATCH + b) * ALL_COLUMNS + unit;
                    uint2 parts[ROWS];
#pragma unroll
                    for (int p = 0; p < ROWS; p++) parts[p] = load_shared_pair(from + (long long)p * BATCH * ALL_COLUMNS);
                    if (t >= 0) prepare(i);  // while they are on their way
                    patience.renew();
                    for (bool waits = true; waits;) {
                        waits = false;
#pragma unroll
                        for (int p = 0; p < ROWS; p++)
                            if ((parts[p].x & 1) != bit || (parts[p].y & 1) != bit)
                                parts[p] = load_shared_pair(from + (long long)p * BATCH * ALL_COLUMNS), waits = true;
                        if (waits && !patience.lasts()) {
                            parts[0].x = parts[0].y = EMPTY;
                            waits = false;
                        }
                    }
#pragma unroll
                    for (int p = 0; p < ROWS; p++) d.x += __uint_as_float(parts[p].x), d.y += __uint_as_float(parts[p].y);
                }
                if (t < 0) {
                    *(float2*)(d_h0 + b * H + unit) = d;
                    if (GROUPS == 1) *(float2*)(d_c0 + b * H + unit) = d_cell[i];
                    continue;
                }
                d.x += d_above[i].x, d.y += d_above[i].y;
                const float2 d_c = make_float2(d_cell[i].x + d.x * by_h[i].x, d_cell[i].y + d.y * by_h[i].y);
                unsigned words[4];
#pragma unroll
                for (int gate = 0; gate < 3; gate++)
                    words[gate] = packed(d_c.x * by_c[i][gate].x, d_c.y * by_c[i][gate].y);
                words[3] = packed(d.x * by_o[i].x, d.y * by_o[i].y);
                T16* to = x + slot(T - 1 - t, g) + place_of[i];
                T16* place = d_gates + ((long long)t * BATCH + b) * 4 * H + unit;
#pragma unroll
                for (int gate = 0; gate < 4; gate++)
                    store_shared_word(to + (gate >> 1) * TILES_N * 256 + (gate & 1) * 16, words[gate]);
#pragma unroll
                for (int gate = 0; gate < 4; gate++) *(unsigned*)(place + gate * H) = words[gate];
                if (t < T - 2) {
                    to = x + slot(T - 3 - t, g) + place_of[i];
#pragma unroll
                    for (int gate = 0; gate < 4; gate++) store_shared_word(to + (gate >> 1) * TILES_N * 256 + (gate & 1) * 16, EMPTY);
                }
                d_cell[i] = make_float2(d_c.x * forget[i].x, d_c.y * forget[i].y);
                if (GROUPS > 1) *(float2*)(d_c0 + b * H + unit) = d_cell[i];
            }
            if (t >= 0 && g + 1 < GROUPS) fetch(t, g + 1);
        }
        if (t < 0) break;

        // this block's part of the gradients of h before step t
        const T16* from = x + slot(T - 1 - t, 0) + row * (ROW_UNITS / 8 * TILES_N * 256) + (warp * BLOCKS_K * TILES_N * 32 + lane) * 8;
        const int use = T - 1 - t;
        const unsigned bit = (use / RING) & 1;
        float* to = ring + ((long long)(use % RING) * ROWS + row) * BATCH * ALL_COLUMNS + column0;
#pragma unroll 1
        for (int g = 0; g < GROUPS; g++) {
            const int batch_rows = min(GROUP_BATCH, BATCH - row0 - g * GROUP_BATCH), rows = (batch_rows - r + 7) >> 3;
            float acc[TILES][TILES_N][4] = {};
            pace.hold(t < T - 1 && !g ? PACE : 0);
            product_of_arriving<TILES>(acc, kept, more, from + g * VECTORS, present, rows, patience, pace,
                                       [&] { if (t > 0 && g == GROUPS - 1) fetch(t - 1, 0); });
            float* place = sums + turn * WARPS * TILES_N * 8 * STRIDE;
            put_sums<TILES, STRIDE>(place + warp * TILES_N * 8 * STRIDE, acc, lane);
            barrier();
            pace.begin();
            turn ^= 1;
            for (int item = thread; item < COLUMNS / 4 * batch_rows; item += THREADS) {
                const int n = item / (COLUMNS / 4), m = item % (COLUMNS / 4) * 4;
                const float4 x = sum_of_warps<WARPS, STRIDE>(place, n, m);
                store_shared_words(to + (row0 + g * GROUP_BATCH + n) * ALL_COLUMNS + m,
                                   make_uint4(marked(x.x, bit), marked(x.y, bit), marked(x.z, bit), marked(x.w, bit)));
            }
        }
    }
}
#endif
