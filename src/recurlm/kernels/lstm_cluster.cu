// The recurrence of an LSTM layer with its weights on the chip, for large batches, by clusters of blocks that add their sums through
// shared memory and products of groups of four warps (compute capability 9.0). As lstm.cu, of which this differs in who does what:
//
// Both kernels: a cluster owns ROWS rows of the product; its block `rank` multiplies part `rank` of the vectors by them, and sends
// each sum to the block that turns it into new values. So every block loads only a part of the vectors from the L2 cache, whose
// bandwidth bounds a step where every block loads all of them. Sums travel in 16 bits, to places that hold EMPTY until they arrive and
// again when they have been read: a block that sends sums of step t + RING has vectors that depend on every block's having read those of step t.
//
// A block's warps are TEAMS teams of WARPS_M, with the same weights and a share of the batch each: while one waits, another works. They
// multiply in turn, for teams in step would all need the same part of the processor at once. A warp has WARP_TILES tiles of 16 rows.
// Vectors go from the L2 cache to shared memory, where the matrix units find them; when a product is over, its sums take their place.
//
// forward: the rows are the gates of UNITS units, the vector is h. backward: the rows are COLUMNS units of h, the vector is
// the gates' gradients, by ROW_UNITS units for each block.
//
// Macros: H, BATCH, PARTS, GROUP_BATCH (batch rows of a team), TILES_N, WARPS, HALF as in lstm.cu, GROUPS 1; CLUSTER, TEAMS, WARPS_M,
// WARP_TILES, BLOCKS_K, REGISTERS_K, SLOTS; UNITS = 4 WARPS_M WARP_TILES or COLUMNS = 16 WARPS_M WARP_TILES and ROW_UNITS = 8 BLOCKS_K.

#define TEAM_THREADS (WARPS_M * 32)
#define ROWS (16 * WARPS_M * WARP_TILES)
#define STRIDE (ROWS / 2 + 4)           // words of two sums from one batch row to the next
#define FRAGMENTS (BLOCKS_K * TILES_N)  // of the vectors
#define LOADS ((FRAGMENTS + WARPS_M - 1) / WARPS_M)
#define STAGE_OF(a, b) ((a) > (b) ? (a) : (b))
#define STAGE STAGE_OF(FRAGMENTS * 32, STAGE_OF(TILES_N * 2 * STRIDE, BATCH_SHARE * (ROWS / 2 + 4)))
#define RING 2

// An item is a place of new values: two units and a batch row, of WIDTH rows of the product. A block has SHARE items of a team, those of
// BATCH_SHARE batch rows.
#ifdef UNITS
#define WIDTH 8
#define PART ((H + UNITS - 1) / UNITS * CLUSTER)
typedef uint4 Sums;
#else
#define WIDTH 2
#define PART ((H + COLUMNS - 1) / COLUMNS * CLUSTER)
typedef unsigned Sums;
#endif
#define A_ROW (ROWS / WIDTH)
#define A_SEND (8 / WIDTH)  // items in the 16 bytes that are sent at once
#define BATCH_SHARE ((GROUP_BATCH + CLUSTER - 1) / CLUSTER)
#define SHARE (A_ROW * BATCH_SHARE)
#define ROUNDS ((SHARE + TEAM_THREADS - 1) / TEAM_THREADS)
#define SHARE_WORDS (BATCH_SHARE * (A_ROW + 4))  // of a gate's words of all items, where rows do not meet in the banks of shared memory
#define INBOX (RING * CLUSTER * SHARE)
#define SENDS ((CLUSTER * SHARE / A_SEND + TEAM_THREADS - 1) / TEAM_THREADS)

// What a team has of shared memory, and where its thread stands in it.
struct Places {
    uint4 *weights, *stage;
    Sums* inbox;
    float4* bias;
    Token *is_free, *has_multiplied, *may_multiply;  // of the stage; of this team and the one before it
    int thread, warp, lane, r, q, rank, strip;
    int team, group, row0, rows;  // the number of this team among those of all parts, its first batch row, how many
    Place to[SENDS];              // where this thread's sums go at the first use of the inbox
    int from[SENDS];              // and where it finds them; -1: none

    DEVICE Places(uint4* shared) {
        team = threadIdx.x / TEAM_THREADS, thread = threadIdx.x % TEAM_THREADS;
        warp = thread >> 5, lane = thread & 31, r = lane >> 2, q = lane & 3;
        strip = blockIdx.x % PART / CLUSTER, rank = blockIdx.x % CLUSTER, group = blockIdx.x / PART * TEAMS + team;
        row0 = group * GROUP_BATCH, rows = min(GROUP_BATCH, BATCH - row0);
        weights = shared + warp / 4 * SHARED_K * 2 * WARP_TILES * 128;
        uint4* after = shared + WARPS_M * SHARED_K * 2 * WARP_TILES * 32;
        stage = after + team * STAGE, after += TEAMS * STAGE;
        inbox = (Sums*)after + team * INBOX, after = (uint4*)((Sums*)after + TEAMS * INBOX);
        bias = (float4*)after;
#ifdef UNITS
        after += UNITS;
#endif
        Token* tokens = (Token*)after;
        is_free = tokens + team, has_multiplied = tokens + TEAMS + team;
        may_multiply = tokens + TEAMS + (team + TEAMS - 1) % TEAMS;
    }

    // Before anything arrives. Each block begins with its own share, so that no block is sent to by all at once.
    DEVICE void begin() {
        for (int i = thread; i < INBOX * (int)(sizeof(Sums) / 4); i += TEAM_THREADS) ((unsigned*)inbox)[i] = EMPTY;
        if (thread == 0) begin_token(is_free, WARPS_M), begin_token(has_multiplied, 1);
#pragma unroll
        for (int i = 0; i < SENDS; i++) {
            const int send = thread + i * TEAM_THREADS, item = (send * A_SEND + rank * SHARE) % (CLUSTER * SHARE), n = item / A_ROW;
            to[i] = place_in(inbox + rank * SHARE + item % SHARE, item / SHARE);
            from[i] = send < CLUSTER * SHARE / A_SEND && n < rows ? n * STRIDE + item % A_ROW * (WIDTH / 2) : -1;
        }
        cluster_barrier();
    }

    // Of this team's vectors, those of number `step`.
    DEVICE T16* vectors(T16* x, int step) const { return x + slot(step, group); }

    DEVICE void meet() const {
        if (TEAMS > 1) barrier(team, WARPS_M);
        else barrier();
    }

    // Behind the weights' way to shared memory, where the first team brings them.
    DEVICE void weights_are_there() const {
        written_for_wide();
        barrier();
    }

    // An item of this thread in one of its rounds: whether there is one, its number in this block's share, its batch row of the team's, and which
    // pair of units of the strip.
    DEVICE int mine(int round) const { return min(thread + round * TEAM_THREADS, SHARE - 1); }
    DEVICE int row(int round) const { return rank * BATCH_SHARE + mine(round) / A_ROW; }
    DEVICE int pair(int round) const { return mine(round) % A_ROW; }
    DEVICE bool has(int round) const { return thread + round * TEAM_THREADS < SHARE && row(round) < rows; }
};

typedef uint4 Kept[REGISTERS_K ? REGISTERS_K : 1][2][WARP_TILES];

// Where the part of the weights in shared memory is, behind the first one, that four warps multiply by a half of block k.
DEVICE int tile_of(int k, int half, int m) { return (((k - REGISTERS_K) * 2 + half) * WARP_TILES + m) * 128; }

DEVICE void keep(Kept& kept, const Places& at, int k, int m, uint4 first, uint4 second) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 v = half ? second : first;
        if (k < REGISTERS_K) {
            kept[k < REGISTERS_K ? k : 0][half][m] = v;
        } else if (!at.team) {
            unsigned* to = (unsigned*)(at.weights + tile_of(k, half, m) + at.warp % 4 * 16 + at.r) + at.q;
            to[0] = v.x, to[32] = v.y, to[256] = v.z, to[288] = v.w;  // rows r, r + 8, r, r + 8
        }
    }
}

// Brings this lane's part of the vectors, which begin at `from`, to the stage; bit i of `present` says whether load i is of any, 0 where not.
DEVICE void ask(const Places& at, const T16* from, unsigned present) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int word = (at.warp + i * WARPS_M) * 32 + at.lane;
        if (word < FRAGMENTS * 32) bring(at.stage + word, from + word * 8, present >> i & 1);
    }
}

// Step `use`: this block's part of the sums, sent to their blocks, from the vectors that were asked for at `from`. `then` is called when the
// registers of the product are free.
template <class Then>
DEVICE void multiply_and_send(Places& at, const Kept& kept, const T16* from, int use, Patience& patience, Pace& pace, Then then) {
    patience.renew();
    for (bool too_early = false;; too_early = true) {
        bool waits = false;
        wait_for_brought();
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int word = (at.warp + i * WARPS_M) * 32 + at.lane;
            if (word < FRAGMENTS * 32 && is_empty(at.stage[word])) bring(at.stage + word, from + word * 8, true), waits = true;
        }
        if (!any_lane(waits) || !any_lane(patience.lasts())) {
            pace.judge(too_early);
            break;
        }
    }
    written_for_wide();
    at.meet();
    if (TEAMS > 1 && (at.team || use)) wait_for(at.may_multiply, (use - !at.team) & 1);
    float acc[WARP_TILES][TILES_N][4] = {};
    const Matrix vectors = matrix_at(at.stage, 128, 512), weights = matrix_at(at.weights, 1024, 128);
    wide_begin(acc);
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Matrix b = further(vectors, k * TILES_N * 512 + half * 256);
#pragma unroll
            for (int m = 0; m < WARP_TILES; m++)
                if (k < REGISTERS_K) multiply_wide(acc[m], kept[k < REGISTERS_K ? k : 0][half][m], b);
                else multiply_wide(acc[m], further(weights, tile_of(k, half, m) * 16), b);
        }
    wide_end();
    wide_wait(acc);
    at.meet();
    if (at.thread == 0) arrive(at.has_multiplied);
    unsigned* sums = (unsigned*)at.stage;
#pragma unroll
    for (int m = 0; m < WARP_TILES; m++)
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                sums[(n * 8 + 2 * at.q + e) * STRIDE + (at.warp * WARP_TILES + m) * 8 + at.r] = narrow_sums(acc[m][n][e], acc[m][n][e + 2]);
    at.meet();
    then();
    pace.begin();
    const unsigned offset = use % RING * CLUSTER * SHARE * sizeof(Sums);
#pragma unroll
    for (int i = 0; i < SENDS; i++)
        if (at.from[i] >= 0) send(at.to[i] + offset, *(const uint4*)(sums + at.from[i]));
    warp_barrier();
    if (at.lane == 0) arrive(at.is_free);
}

// The sums of this thread's items at step `use`, over the blocks of the cluster.
DEVICE void receive(float (&sums)[ROUNDS][WIDTH], const Places& at, int use, Patience& patience) {
    Sums* from = at.inbox + use % RING * CLUSTER * SHARE;
    patience.renew();
    for (;;) {
        bool waits = false;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) sums[i][j] = 0.0f;
#pragma unroll
            for (int p = 0; p < CLUSTER; p++) {
                const Sums v = load_arriving(from + p * SHARE + at.mine(i));
                waits |= at.has(i) && is_empty(v);
                add_sums(sums[i], v);
            }
        }
        if (!any_lane(waits)) break;
        if (!any_lane(patience.lasts())) {
            sums[0][0] = __uint_as_float(EMPTY);
            break;
        }
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; i++)
#pragma unroll
        for (int p = 0; p < CLUSTER; p++)
            if (at.has(i)) make_empty(from + p * SHARE + at.mine(i));
}

#ifdef UNITS  // ---- forward --------------------------------------------------------------------------------------------

KERNEL forward(const T16* weights, const T16* b_ih, const T16* b_hh, T16* gates, const T16* h0, const void* c0, T16* x, T16* y,
               float* c, T16* h_last, void* c_last, int is_short, int T, int* trouble, unsigned long long limit) {
    SHARED(shared);
    Places at(shared);
    copy_words(y, h0, BATCH * H / 2, PART * PARTS);
    const int unit0 = at.strip * UNITS, column0 = at.rank * BLOCKS_K * 32;
    Patience patience = {limit, 0, trouble, 0};
    put_bias(at.bias, b_ih, b_hh, unit0);
    at.begin();

    Kept kept;
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
        const int column = column0 + k * 32 + at.q * 2;
#pragma unroll
        for (int m = 0; m < WARP_TILES; m++) {
            uint4 rows[2];  // units, of each its gates
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const int row = (at.warp * WARP_TILES + m) * 16 + 2 * at.r + s, unit = unit0 + row / 4;
                const T16* from = weights + ((long long)(row % 4) * H + unit) * H + column;
                rows[s].x = load_word(from, column < H && unit < H), rows[s].y = load_word(from + 8, column < H && unit < H);
                rows[s].z = load_word(from + 16, column + 16 < H && unit < H);
                rows[s].w = load_word(from + 24, column + 16 < H && unit < H);
            }
            keep(kept, at, k, m, make_uint4(rows[0].x, rows[1].x, rows[0].y, rows[1].y),
                 make_uint4(rows[0].z, rows[1].z, rows[0].w, rows[1].w));
        }
    }
    at.weights_are_there();
    unsigned present = 0;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int fragment = at.warp + i * WARPS_M, column = column0 + fragment / TILES_N * 32 + at.lane / 8 * 8;
        present |= (column < H && fragment % TILES_N * 8 + at.lane % 8 < at.rows) << i;
    }
    Pace pace;

    bool there[ROUNDS];
    int place[ROUNDS];  // of h and c of an item at a step
    float2 cell[ROUNDS];
    unsigned input[ROUNDS][4];
    auto fetch = [&](int t) {  // the gates' sums without h's part
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int unit = unit0 + at.pair(i) * 2;
            const T16* from = gates + (long long)t * BATCH * 4 * H + (place[i] - unit) * 4 + unit;
#pragma unroll
            for (int gate = 0; gate < 4; gate++) input[i][gate] = there[i] ? load_once((const unsigned*)(from + gate * H)) : 0;
        }
    };
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int unit = unit0 + at.pair(i) * 2;
        there[i] = at.has(i) && unit < H;
        place[i] = (at.row0 + at.row(i)) * H + unit;
        cell[i] = make_float2(0.0f, 0.0f);
        if (!there[i]) continue;
        cell[i] = make_float2(state_at(c0, place[i], is_short), state_at(c0, place[i] + 1, is_short));
        *(float2*)(c + place[i]) = cell[i];
        store_shared_word(at.vectors(x, 0) + place_in_vectors(at.row(i), unit), *(const unsigned*)(h0 + place[i]));
    }
#pragma unroll 1
    for (int t = 0; t < T; t++) {
        const T16* from = at.vectors(x, t) + at.rank * FRAGMENTS * 256;
        if (t) wait_for(at.is_free, (t - 1) & 1);
        pace.hold(t ? PACE : 0);
        ask(at, from, present);
        multiply_and_send(at, kept, from, t, patience, pace, [&] { fetch(t); });
        float sums[ROUNDS][WIDTH];
        receive(sums, at, t, patience);
        unsigned word[ROUNDS], gate_of[ROUNDS][4];
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            float2 of[4];
#pragma unroll
            for (int gate = 0; gate < 4; gate++) {
                const float *added = (const float*)(at.bias + at.pair(i) * 2) + gate;
                of[gate] = unpacked(input[i][gate]);
                of[gate].x += added[0] + sums[i][gate], of[gate].y += added[4] + sums[i][gate + 4];
                of[gate] = gate == 2 ? make_float2(tangent(of[gate].x), tangent(of[gate].y))
                                     : make_float2(sigmoid(of[gate].x), sigmoid(of[gate].y));
                gate_of[i][gate] = packed(of[gate].x, of[gate].y);
            }
            cell[i].x = of[1].x * cell[i].x + of[0].x * of[2].x, cell[i].y = of[1].y * cell[i].y + of[0].y * of[2].y;
            word[i] = packed(of[3].x * tangent(cell[i].x), of[3].y * tangent(cell[i].y));
            if (there[i] && t + 1 < T)
                store_shared_word(at.vectors(x, t + 1) + place_in_vectors(at.row(i), unit0 + at.pair(i) * 2), word[i]);
        }
        // others wait for x alone: the rest is written after it
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            if (!there[i]) continue;
            const long long step = (long long)(t + 1) * BATCH * H;
            const int unit = unit0 + at.pair(i) * 2;
            store_once((float2*)(c + step + place[i]), cell[i]);
            store_once((unsigned*)(y + step + place[i]), word[i]);
            T16* to = gates + (long long)t * BATCH * 4 * H + (place[i] - unit) * 4 + unit;
#pragma unroll
            for (int gate = 0; gate < 4; gate++) store_once((unsigned*)(to + gate * H), gate_of[i][gate]);
            if (t) store_shared_word(at.vectors(x, t - 1) + place_in_vectors(at.row(i), unit), EMPTY);
        }
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; i++)  // the last state: each thread copies what it wrote
        if (there[i]) {
            copy_last(h_last, c_last, is_short, y, c, T, place[i]);
            copy_last(h_last, c_last, is_short, y, c, T, place[i] + 1);
        }
    cluster_barrier();  // a block that has ended has no shared memory to write to
}

#else  // ---- backward --------------------------------------------------------------------------------------------------

// As in lstm.cu; there is no ring.
KERNEL backward(const T16* weights, const T16* gates, const float* c, const T16* d_h, const T16* d_hT,
                const float* d_cT, T16* x, T16* d_gates, float* d_h0, float* d_c0, float*, int T, int* trouble,
                unsigned long long limit) {
    SHARED(shared);
    Places at(shared);
    const int column0 = at.strip * COLUMNS, row_unit0 = at.rank * ROW_UNITS;
    Patience patience = {limit, 0, trouble, 0};
    at.begin();

    Kept kept;
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
#pragma unroll
        for (int m = 0; m < WARP_TILES; m++) {
            unsigned words[2][4];
            const int column = column0 + (at.warp * WARP_TILES + m) * 16 + 2 * at.r;
#pragma unroll
            for (int gate = 0; gate < 4; gate++) {  // two neighbouring units by two neighbouring columns
                const int unit = row_unit0 + k * 8 + 2 * at.q;
                const T16* from = weights + ((long long)gate * H + unit) * H + column;
                const unsigned even = load_word(from, unit < H && column < H);
                const unsigned odd = load_word(from + H, unit < H && column < H);
                words[0][gate] = (even & 0xffff) | odd << 16, words[1][gate] = even >> 16 | (odd & 0xffff0000u);
            }
            keep(kept, at, k, m, make_uint4(words[0][0], words[1][0], words[0][1], words[1][1]),
                 make_uint4(words[0][2], words[1][2], words[0][3], words[1][3]));
        }
    }
    at.weights_are_there();
    unsigned present = 0;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int fragment = at.warp + i * WARPS_M;
        present |= (row_unit0 + fragment / TILES_N * 8 < H && fragment % TILES_N * 8 + at.lane % 8 < at.rows) << i;
    }
    Pace pace;

    bool there[ROUNDS];
    int place[ROUNDS];  // of h and c of an item at a step
    unsigned gates_of[ROUNDS][4], d_h_of[ROUNDS];
    float2 cell[ROUNDS], cell_before[ROUNDS], d_cell[ROUNDS];
    auto fetch = [&](int t) {  // what the gradients of the gates at step t need of memory
        const long long step = (long long)t * BATCH * H;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            if (!there[i]) continue;
            const int unit = column0 + at.pair(i) * 2;
#pragma unroll
            for (int gate = 0; gate < 4; gate++)
                gates_of[i][gate] = load_once((const unsigned*)(gates + step * 4 + (place[i] - unit) * 4 + gate * H + unit));
            d_h_of[i] = load_once((const unsigned*)(d_h + step + place[i]));
            cell_before[i] = load_once((const float2*)(c + step + place[i]));
        }
    };
    int piece[ROUNDS], to[ROUNDS];  // 8 neighbouring units of a gate: among the words of all items in shared memory, and in x; -1: none
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int k = at.thread + i * TEAM_THREADS, row = k % BATCH_SHARE, gate = k / BATCH_SHARE % 4, chunk = k / BATCH_SHARE / 4;
        const int unit = column0 + chunk * 8, b = at.rank * BATCH_SHARE + row;
        piece[i] = gate * SHARE_WORDS + row * (A_ROW + 4) + chunk * 4;
        to[i] = k < SHARE && b < at.rows && unit < H ? place_in_vectors(b, unit, gate) : -1;
    }
    auto clear = [&](int step) {  // this thread's pieces of x
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
            if (to[i] >= 0) store_shared_words(at.vectors(x, step) + to[i], make_uint4(EMPTY, EMPTY, EMPTY, EMPTY));
    };
    // The gradients of the gates at step t for those `sums` of h; others wait for those in x alone.
    auto differentiate = [&](int t, const float (&sums)[ROUNDS][WIDTH]) {
        unsigned words[ROUNDS][4], *all = (unsigned*)at.stage;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            float2 of[4], d_of[4];
#pragma unroll
            for (int gate = 0; gate < 4; gate++) of[gate] = unpacked(gates_of[i][gate]);
            const float2 above = unpacked(d_h_of[i]);
#define EACH(x, j)                                                                             \
    {                                                                                          \
        const float tanh_c = tangent(cell[i].x), d = sums[i][j] + above.x;                     \
        const float d_c = d_cell[i].x + d * of[3].x * (1.0f - tanh_c * tanh_c);                \
        d_of[0].x = d_c * (of[2].x * of[0].x * (1.0f - of[0].x));                              \
        d_of[1].x = d_c * (cell_before[i].x * of[1].x * (1.0f - of[1].x));                     \
        d_of[2].x = d_c * (of[0].x * (1.0f - of[2].x * of[2].x));                              \
        d_of[3].x = d * (tanh_c * of[3].x * (1.0f - of[3].x));                                 \
        d_cell[i].x = d_c * of[1].x, cell[i].x = cell_before[i].x;                             \
    }
            EACH(x, 0)
            EACH(y, 1)
#undef EACH
#pragma unroll
            for (int gate = 0; gate < 4; gate++) {
                words[i][gate] = packed(d_of[gate].x, d_of[gate].y);
                if (at.has(i)) all[gate * SHARE_WORDS + at.mine(i) + at.mine(i) / A_ROW * 4] = words[i][gate];
            }
        }
        at.meet();
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
            if (to[i] >= 0) store_shared_words(at.vectors(x, T - 1 - t) + to[i], *(const uint4*)(all + piece[i]));
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            if (!there[i]) continue;
            const int unit = column0 + at.pair(i) * 2;
            T16* place_of = d_gates + (long long)t * BATCH * 4 * H + (place[i] - unit) * 4 + unit;
#pragma unroll
            for (int gate = 0; gate < 4; gate++) store_once((unsigned*)(place_of + gate * H), words[i][gate]);
        }
        if (t < T - 2) clear(T - 3 - t);
    };
    float sums[ROUNDS][WIDTH];
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int unit = column0 + at.pair(i) * 2;
        there[i] = at.has(i) && unit < H;
        place[i] = (at.row0 + at.row(i)) * H + unit;
        const float2 d = there[i] && d_hT ? unpacked(*(const unsigned*)(d_hT + place[i])) : make_float2(0.0f, 0.0f);
        sums[i][0] = d.x, sums[i][1] = d.y;
        cell[i] = there[i] ? *(const float2*)(c + (long long)T * BATCH * H + place[i]) : make_float2(0.0f, 0.0f);
        d_cell[i] = there[i] && d_cT ? *(const float2*)(d_cT + place[i]) : make_float2(0.0f, 0.0f);
    }
    fetch(T - 1);
    differentiate(T - 1, sums);
#pragma unroll 1
    for (int use = 0; use < T; use++) {
        const int t = T - 2 - use;  // of the gradients; -1: of the first state
        const T16* from = at.vectors(x, use) + at.rank * FRAGMENTS * 256;
        at.meet();  // the stage is free
        pace.hold(use ? PACE : 0);
        ask(at, from, present);
        multiply_and_send(at, kept, from, use, patience, pace, [&] { if (t >= 0) fetch(t); });
        receive(sums, at, use, patience);
        wait_for(at.is_free, use & 1);
        if (t >= 0) differentiate(t, sums);
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; i++)
        if (there[i]) {
            *(float2*)(d_h0 + place[i]) = make_float2(sums[i][0], sums[i][1]);
            *(float2*)(d_c0 + place[i]) = d_cell[i];
        }
    cluster_barrier();  // a block that has ended has no shared memory to write to
}
#endif
