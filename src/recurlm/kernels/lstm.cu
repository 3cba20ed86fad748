// The recurrence of an LSTM layer with its weights on the chip: one launch walks through all steps.
//
// Every block keeps its part of the recurrent weights R (4H x H) in registers, and in shared memory what does not fit
// there. Blocks exchange vectors through the L2 cache, and the flag is the data: a place that is not yet written holds
// EMPTY, a NaN that no computation gives, so a reader simply loads until no word is EMPTY. No place is written twice,
// except in the ring of partial sums, whose words carry a bit that tells one use of a place from the next.
//
// forward: a block owns UNITS units, computes their 4 * UNITS gates from the whole of h, and publishes their new h.
// backward: block (i, j) multiplies the gradients of the gates of ROW_UNITS units by the weights to COLUMNS units of h;
// the sums over i are ring-buffered, and each block turns its share of them into gradients of gates.
//
// The products are those of 16 x 8 x 16 tiles: weights are the matrix of 16 rows, the batch has the 8 columns. The sum
// over k may take k in any order, so each lane loads 8 neighbours in 16 bytes and calls them what the tiles want.
//
// Compiled at run time with the sizes as macros: H (a multiple of 16), BATCH, GROUPS, GROUP_BATCH, TILES_N, WARPS, HALF
// (fp16 instead of bf16); forward: UNITS, BLOCKS_K, REGISTERS_K; backward: ROW_UNITS, COLUMNS, BLOCKS_K, REGISTERS_K.
// Batch rows are worked on in GROUPS groups of GROUP_BATCH rows, so that one group's exchange hides behind another's work.

#ifndef ON_CPU  // the tests bring these for a CPU
#define KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
#define DEVICE __device__ __forceinline__

#define SHARED(name) extern __shared__ uint4 name[]

DEVICE void barrier() { __syncthreads(); }

// 16 bytes that other blocks may be writing: past the L1 cache, each 4-byte word whole
DEVICE uint4 load_shared_words(const void* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

DEVICE uint2 load_shared_pair(const void* p) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}

DEVICE void store_shared_word(void* p, unsigned v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

DEVICE void store_shared_pair(void* p, uint2 v) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

DEVICE unsigned from_lane(unsigned v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

DEVICE unsigned long long nanoseconds() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

DEVICE float exponential(float x) { return __expf(x); }
DEVICE float quotient(float a, float b) { return __fdividef(a, b); }

#if HALF
#define KIND "f16"
DEVICE unsigned packed(float low, float high) {
    unsigned v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
DEVICE float2 unpacked(unsigned v) {
    float2 x;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(x.x), "=f"(x.y) : "r"(v));
    return x;
}
#else
#define KIND "bf16"
DEVICE unsigned packed(float low, float high) {
    unsigned v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
DEVICE float2 unpacked(unsigned v) { return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)); }
#endif

// d += a b, of a 16 x 16 and a 16 x 8 tile
DEVICE void multiply(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

typedef unsigned short T16;

#define EMPTY 0xffffffffu
#define THREADS (WARPS * 32)
#define SHARED_K (BLOCKS_K - REGISTERS_K)

DEVICE bool is_empty(uint4 v) { return v.x == EMPTY || v.y == EMPTY || v.z == EMPTY || v.w == EMPTY; }

// Whether to go on waiting. A reader that has waited for too long goes on with what is there: NaN, which then spreads to
// every block, so that all of them end, and the loss says it.
struct Patience {
    unsigned long long limit, start;
    int* trouble;
    unsigned rounds;

    DEVICE bool lasts() {
        if (++rounds & 255) return true;
        unsigned long long now = nanoseconds();
        if (!start) start = now;
        if (*(volatile int*)trouble) return false;
        if (now - start < limit) return true;
        *(volatile int*)trouble = 1;
        return false;
    }
    DEVICE void renew() { rounds = 0, start = 0; }
};

DEVICE float sigmoid(float x) { return quotient(1.0f, 1.0f + exponential(-x)); }
DEVICE float tangent(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// acc += weights * vectors, over this warp's share of k. `weights` are the fragments kept in registers, `more` those in shared
// memory, one place of 16 bytes a lane.
template <int TILES_M>
DEVICE void product(float (&acc)[TILES_M][TILES_N][4], const uint4 (&weights)[REGISTERS_K ? REGISTERS_K : 1][2][TILES_M],
                    const uint4* more, const uint4 (&vectors)[BLOCKS_K][TILES_N]) {
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int m = 0; m < TILES_M; m++) {
                uint4 a = k < REGISTERS_K ? weights[k < REGISTERS_K ? k : 0][half][m]
                                          : more[(((k - REGISTERS_K) * 2 + half) * TILES_M + m) * 32];
#pragma unroll
                for (int n = 0; n < TILES_N; n++) {
                    uint4 b = vectors[k][n];
                    multiply(acc[m][n], a.x, a.y, a.z, a.w, half ? b.z : b.x, half ? b.w : b.y);
                }
            }
        }
    }
}

// The warp's sums to shared memory, as [column n][row m] with rows of STRIDE floats.
template <int TILES_M>
DEVICE void put_sums(float* sums, const float (&acc)[TILES_M][TILES_N][4], int lane) {
    const int r = lane >> 2, q = lane & 3;
#pragma unroll
    for (int m = 0; m < TILES_M; m++)
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sums[(n * 8 + 2 * q + (e & 1)) * (16 * TILES_M + 4) + m * 16 + r + (e >> 1) * 8] = acc[m][n][e];
}

// The sum over warps of two neighbouring rows m of column n.
template <int TILES_M>
DEVICE float2 sum_of_warps(const float* sums, int n, int m) {
    constexpr int STRIDE = 16 * TILES_M + 4;
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        float2 part = *(const float2*)(sums + (w * TILES_N * 8 + n) * STRIDE + m);
        total.x += part.x, total.y += part.y;
    }
    return total;
}

#ifdef UNITS  // ---- forward --------------------------------------------------------------------------------------------

#define TILES (UNITS / 4)
#define PAIRS (UNITS / 2)
#define ITEMS (PAIRS * GROUP_BATCH * 4)
#define ROUNDS ((ITEMS + THREADS - 1) / THREADS)

// Row m of a block's product: pairs of units, and of each pair the gates i, f, g, o.
DEVICE int gate_row(int unit0, int m) { return ((m >> 1) & 3) * H + unit0 + (m >> 3) * 2 + (m & 1); }

// weights R (4H, H); gates (T, BATCH, 4H): pre-activations without R h, become the gates; h0, c0 (BATCH, H); h (T, BATCH, H):
// every word EMPTY before; c (T, BATCH, H).
KERNEL forward(const T16* weights, T16* gates, const T16* h0, const float* c0, T16* h, float* c, int T, int* trouble,
               unsigned long long limit) {
    SHARED(shared);
    const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, r = lane >> 2, q = lane & 3;
    const int unit0 = blockIdx.x * UNITS;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4* more = shared + warp * SHARED_K * 2 * TILES * 32 + lane;
    float* sums = (float*)(shared + WARPS * SHARED_K * 2 * TILES * 32);
    Patience patience = {limit, 0, trouble, 0};

    uint4 kept[REGISTERS_K ? REGISTERS_K : 1][2][TILES];
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
        const int column = (warp * BLOCKS_K + k) * 32 + q * 8;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            uint4 rows[2];
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const int unit = unit0 + m * 4 + s * 2 + (r & 1);
                const int row = gate_row(unit0, m * 16 + s * 8 + r);
                rows[s] = column < H && unit < H ? *(const uint4*)(weights + (long long)row * H + column) : zero;
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

    // an item is a pair of units, a batch row and a gate; the four gates of a pair are four neighbouring lanes
    unsigned input[ROUNDS];
    float2 cell[ROUNDS];
    auto fetch = [&](int t, int g) {  // what the turn of group g at step t needs of memory
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int item = thread + i * THREADS, b = g * GROUP_BATCH + item / (4 * PAIRS), unit = unit0 + item / 4 % PAIRS * 2;
            const bool there = item < ITEMS && b < BATCH && unit < H;
            const long long at = ((long long)t * BATCH + b) * H + unit;
            input[i] = there ? *(const unsigned*)(gates + (at - unit) * 4 + (item & 3) * H + unit) : 0;
            if (t == 0) cell[i] = there ? *(const float2*)(c0 + b * H + unit) : make_float2(0.0f, 0.0f);
            if (t > 0 && GROUPS > 1 && there) cell[i] = *(const float2*)(c + at - BATCH * H);
        }
    };
    fetch(0, 0);

    int turn = 0;
    for (int t = 0; t < T; t++) {
        const T16* before = t ? h + (long long)(t - 1) * BATCH * H : h0;
#pragma unroll 1
        for (int g = 0; g < GROUPS; g++) {
            uint4 vectors[BLOCKS_K][TILES_N];
#pragma unroll
            for (int k = 0; k < BLOCKS_K; k++)
#pragma unroll
                for (int n = 0; n < TILES_N; n++) {
                    const int column = (warp * BLOCKS_K + k) * 32 + q * 8, row = n * 8 + r, b = g * GROUP_BATCH + row;
                    const bool there = column < H && row < GROUP_BATCH && b < BATCH;
                    vectors[k][n] = there ? load_shared_words(before + b * H + column) : zero;
                }
            patience.renew();
            for (bool waits = t > 0; waits;) {
                waits = false;
#pragma unroll
                for (int k = 0; k < BLOCKS_K; k++)
#pragma unroll
                    for (int n = 0; n < TILES_N; n++)
                        if (is_empty(vectors[k][n])) {
                            const int column = (warp * BLOCKS_K + k) * 32 + q * 8, b = g * GROUP_BATCH + n * 8 + r;
                            vectors[k][n] = load_shared_words(before + b * H + column), waits = true;
                        }
                waits = waits && patience.lasts();
            }

            float acc[TILES][TILES_N][4] = {};
            product<TILES>(acc, kept, more, vectors);
            float* place = sums + turn * WARPS * TILES_N * 8 * (16 * TILES + 4);
            put_sums<TILES>(place + warp * TILES_N * 8 * (16 * TILES + 4), acc, lane);
            barrier();
            turn ^= 1;

            float2 gate_of[ROUNDS], new_cell[ROUNDS];
#pragma unroll
            for (int i = 0; i < ROUNDS; i++) {
                const int item = thread + i * THREADS, gate = item & 3, n = item / (4 * PAIRS), pair = item / 4 % PAIRS;
                const int b = g * GROUP_BATCH + n, unit = unit0 + pair * 2;
                float2 x = unpacked(input[i]);
                if (item < ITEMS) {
                    const float2 more_x = sum_of_warps<TILES>(place, n, pair * 8 + gate * 2);
                    x.x += more_x.x, x.y += more_x.y;
                }
                const float scale = gate == 2 ? 2.0f : 1.0f;  // tanh(x) = 2 sigmoid(2x) - 1
                gate_of[i].x = scale * sigmoid(scale * x.x) - (scale - 1.0f);
                gate_of[i].y = scale * sigmoid(scale * x.y) - (scale - 1.0f);
                const int first = lane & ~3;
                float2 of[4];
#pragma unroll
                for (int other = 0; other < 4; other++) {
                    of[other].x = __uint_as_float(from_lane(__float_as_uint(gate_of[i].x), first + other));
                    of[other].y = __uint_as_float(from_lane(__float_as_uint(gate_of[i].y), first + other));
                }
                new_cell[i].x = of[1].x * cell[i].x + of[0].x * of[2].x;
                new_cell[i].y = of[1].y * cell[i].y + of[0].y * of[2].y;
                if (gate == 0 && item < ITEMS && b < BATCH && unit < H)
                    store_shared_word(h + ((long long)t * BATCH + b) * H + unit,
                                      packed(of[3].x * tangent(new_cell[i].x), of[3].y * tangent(new_cell[i].y)));
            }
            // others wait for h alone: the rest is written after it
#pragma unroll
            for (int i = 0; i < ROUNDS; i++) {
                const int item = thread + i * THREADS, gate = item & 3, b = g * GROUP_BATCH + item / (4 * PAIRS);
                const int unit = unit0 + item / 4 % PAIRS * 2;
                if (item < ITEMS && b < BATCH && unit < H) {
                    const long long at = ((long long)t * BATCH + b) * H + unit;
                    if (gate == 1) *(float2*)(c + at) = new_cell[i];
                    *(unsigned*)(gates + (at - unit) * 4 + gate * H + unit) = packed(gate_of[i].x, gate_of[i].y);
                }
                cell[i] = new_cell[i];
            }
            if (g + 1 < GROUPS) fetch(t, g + 1);
            else if (t + 1 < T) fetch(t + 1, 0);
        }
    }
}

#else  // ---- backward --------------------------------------------------------------------------------------------------

#define TILES (COLUMNS / 16)
#define PAIRS (COLUMNS / 2)
#define ROWS ((H + ROW_UNITS - 1) / ROW_UNITS)
#define ALL_COLUMNS ((H + COLUMNS - 1) / COLUMNS * COLUMNS)
#define SHARE ((PAIRS * GROUP_BATCH + ROWS - 1) / ROWS)
#define ROUNDS ((SHARE + THREADS - 1) / THREADS)
#define RING 4

// Chunk k of 8 gate gradients of a block's rows: 16 units of a gate, then the same of the next gate.
DEVICE int chunk_gate(int k) { return (k >> 1) & 3; }
DEVICE int chunk_unit(int k) { return (k >> 3) * 16 + (k & 1) * 8; }

// weights R (4H, H); gates (T, BATCH, 4H) after their activation; c (T, BATCH, H); c0 (BATCH, H); d_h (T, BATCH, H) the gradient
// of h, d_hT, d_cT (BATCH, H) of the last state; d_gates (T, BATCH, 4H), every word EMPTY before, of the pre-activations;
// d_h0, d_c0 (BATCH, H) of the first state; ring (RING, ROWS, BATCH, ALL_COLUMNS), zeros before.
KERNEL backward(const T16* weights, const T16* gates, const float* c, const float* c0, const T16* d_h, const float* d_hT,
                const float* d_cT, T16* d_gates, float* d_h0, float* d_c0, float* ring, int T, int* trouble,
                unsigned long long limit) {
    SHARED(shared);
    const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, r = lane >> 2, q = lane & 3;
    const int row = blockIdx.x % ROWS, column0 = blockIdx.x / ROWS * COLUMNS, row_unit0 = row * ROW_UNITS;
    const uint4 zero = make_uint4(0, 0, 0, 0);
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
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const int column = column0 + m * 16 + s * 8 + r;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    words[s][e] = 0;
                    if (inside && column < H)
                        words[s][e] = from[(2 * e) * H + column] | (unsigned)from[(2 * e + 1) * H + column] << 16;
                }
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

    // an item is a pair of units and a batch row; a block's share of its columns' items
    unsigned gates_of[ROUNDS][4], d_h_of[ROUNDS];
    float2 cell[ROUNDS], cell_before[ROUNDS], d_cell[ROUNDS];
    auto fetch = [&](int t, int g) {  // what the turn of group g at step t needs of memory
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int mine = thread + i * THREADS, item = row * SHARE + mine;
            const int b = g * GROUP_BATCH + item / PAIRS, unit = column0 + item % PAIRS * 2;
            if (mine >= SHARE || item >= PAIRS * GROUP_BATCH || b >= BATCH || unit >= H) continue;
            const long long at = ((long long)t * BATCH + b) * H + unit;
#pragma unroll
            for (int gate = 0; gate < 4; gate++)
                gates_of[i][gate] = *(const unsigned*)(gates + (at - unit) * 4 + gate * H + unit);
            d_h_of[i] = *(const unsigned*)(d_h + at);
            cell[i] = *(const float2*)(c + at);
            cell_before[i] = *(const float2*)(t ? c + at - BATCH * H : c0 + b * H + unit);
            if (t == T - 1) d_cell[i] = *(const float2*)(d_cT + b * H + unit);
            else if (GROUPS > 1) d_cell[i] = *(const float2*)(d_c0 + b * H + unit);
        }
    };
    fetch(T - 1, 0);

    int turn = 0;
    for (int t = T - 1; t >= -1; t--) {
        // the gradients of h from step t + 1, and the share of the gates' gradients of step t
#pragma unroll 1
        for (int g = 0; g < GROUPS; g++) {
#pragma unroll
            for (int i = 0; i < ROUNDS; i++) {
                const int mine = thread + i * THREADS, item = row * SHARE + mine;
                const int b = g * GROUP_BATCH + item / PAIRS, unit = column0 + item % PAIRS * 2;
                if (mine >= SHARE || item >= PAIRS * GROUP_BATCH || b >= BATCH || unit >= H) continue;
                float2 d = make_float2(0.0f, 0.0f);
                if (t == T - 1) {
                    d = *(const float2*)(d_hT + b * H + unit);
                } else {
                    const int use = T - 2 - t;
                    const unsigned bit = (use / RING + 1) & 1;
                    const float* from = ring + ((long long)(use % RING) * ROWS * BATCH + b) * ALL_COLUMNS + unit;
                    uint2 parts[ROWS];
#pragma unroll
                    for (int p = 0; p < ROWS; p++) parts[p] = load_shared_pair(from + (long long)p * BATCH * ALL_COLUMNS);
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
                const float2 more_d = unpacked(d_h_of[i]);
                d.x += more_d.x, d.y += more_d.y;
                float2 of[4], d_of[4];
#pragma unroll
                for (int gate = 0; gate < 4; gate++) of[gate] = unpacked(gates_of[i][gate]);
#define EACH(x)                                                                                                       \
    {                                                                                                                 \
        const float tanh_c = tangent(cell[i].x);                                                                      \
        const float d_c = d_cell[i].x + d.x * of[3].x * (1.0f - tanh_c * tanh_c);                                     \
        d_of[0].x = d_c * of[2].x * of[0].x * (1.0f - of[0].x);                                                       \
        d_of[1].x = d_c * cell_before[i].x * of[1].x * (1.0f - of[1].x);                                              \
        d_of[2].x = d_c * of[0].x * (1.0f - of[2].x * of[2].x);                                                       \
        d_of[3].x = d.x * tanh_c * of[3].x * (1.0f - of[3].x);                                                        \
        d_cell[i].x = d_c * of[1].x;                                                                                  \
    }
                EACH(x)
                EACH(y)
#undef EACH
                const long long at = ((long long)t * BATCH + b) * H + unit;
#pragma unroll
                for (int gate = 0; gate < 4; gate++)
                    store_shared_word(d_gates + (at - unit) * 4 + gate * H + unit, packed(d_of[gate].x, d_of[gate].y));
                if (GROUPS > 1) *(float2*)(d_c0 + b * H + unit) = d_cell[i];
            }
            if (t >= 0 && g + 1 < GROUPS) fetch(t, g + 1);
            else if (t > 0) fetch(t - 1, 0);
        }
        if (t < 0) break;

        // this block's part of the gradients of h before step t
        const T16* from = d_gates + (long long)t * BATCH * 4 * H;
        const int use = T - 1 - t;
        const unsigned bit = (use / RING + 1) & 1;
        float* to = ring + ((long long)(use % RING) * ROWS + row) * BATCH * ALL_COLUMNS + column0;
#pragma unroll 1
        for (int g = 0; g < GROUPS; g++) {
            uint4 vectors[BLOCKS_K][TILES_N];
#pragma unroll
            for (int k = 0; k < BLOCKS_K; k++)
#pragma unroll
                for (int n = 0; n < TILES_N; n++) {
                    const int chunk = (warp * BLOCKS_K + k) * 4 + q, unit = row_unit0 + chunk_unit(chunk);
                    const int b = g * GROUP_BATCH + n * 8 + r;
                    const bool there = chunk < ROW_UNITS / 2 && unit < H && n * 8 + r < GROUP_BATCH && b < BATCH;
                    vectors[k][n] = there ? load_shared_words(from + (b * 4 + chunk_gate(chunk)) * H + unit) : zero;
                }
            patience.renew();
            for (bool waits = true; waits;) {
                waits = false;
#pragma unroll
                for (int k = 0; k < BLOCKS_K; k++)
#pragma unroll
                    for (int n = 0; n < TILES_N; n++)
                        if (is_empty(vectors[k][n])) {
                            const int chunk = (warp * BLOCKS_K + k) * 4 + q, b = g * GROUP_BATCH + n * 8 + r;
                            vectors[k][n] = load_shared_words(
                                from + (b * 4 + chunk_gate(chunk)) * H + row_unit0 + chunk_unit(chunk));
                            waits = true;
                        }
                waits = waits && patience.lasts();
            }

            float acc[TILES][TILES_N][4] = {};
            product<TILES>(acc, kept, more, vectors);
            float* place = sums + turn * WARPS * TILES_N * 8 * (16 * TILES + 4);
            put_sums<TILES>(place + warp * TILES_N * 8 * (16 * TILES + 4), acc, lane);
            barrier();
            turn ^= 1;
            for (int item = thread; item < PAIRS * GROUP_BATCH; item += THREADS) {
                const int n = item / PAIRS, pair = item % PAIRS, b = g * GROUP_BATCH + n;
                if (b >= BATCH) break;
                const float2 x = sum_of_warps<TILES>(place, n, pair * 2);
                uint2 marked = make_uint2((__float_as_uint(x.x) & ~1u) | bit, (__float_as_uint(x.y) & ~1u) | bit);
                store_shared_pair(to + b * ALL_COLUMNS + pair * 2, marked);
            }
        }
    }
}
#endif
