// The recurrence of an LSTM layer with its weights on the chip, for large batches, by clusters of blocks that add their sums through
// shared memory and products of groups of four warps (compute capability 9.0). As lstm.cu, of which this differs in who does what:
//
// Both kernels: a cluster owns ROWS rows of the product; its block `rank` multiplies part `rank` of the vectors by them, and sends
// each sum to the block that turns it into new values. So every block loads only a part of the vectors from the L2 cache, whose
// bandwidth bounds a step where every block loads all of them. Sums travel in 16 bits, to places that hold EMPTY until they arrive and
// again when they have been read: a block that sends sums of step t + RING has vectors that depend on every block's having read those of step t.
//
// The first WARPS_M warps of a block multiply; the others are TEAMS teams of TEAM_WARPS, with a share of the batch each. A team brings its
// vectors from the L2 cache to shared memory, where the matrix units find them, and turns the sums that come back into new values; the
// weights are in the registers of those who multiply, who serve the teams in turn: what one team waits for is another's work.
//
// forward: the rows are the gates of UNITS units, the vector is h. backward: the rows are COLUMNS units of h, the vector is
// the gates' gradients, by ROW_UNITS units for each block.
//
// Macros: H, BATCH, PARTS, GROUP_BATCH (batch rows of a team), TILES_N, WARPS, SLOTS, HALF as in lstm.cu, GROUPS 1; CLUSTER, TEAMS, TEAM_WARPS,
// WARPS_M, WARP_TILES (of 16 rows, of a warp), BLOCKS_K, REGISTERS_K; MULTIPLY_REGISTERS and TEAM_REGISTERS of a thread; UNITS = 4 WARPS_M WARP_TILES or
// COLUMNS = 16 WARPS_M WARP_TILES and ROW_UNITS = 8 BLOCKS_K.

#define MULTIPLIERS (WARPS_M * 32)
#define TEAM_THREADS (TEAM_WARPS * 32)
#define ROWS (16 * WARPS_M * WARP_TILES)
#define STRIDE (ROWS / 2 + 4)           // words of two sums from one batch row to the next
#define FRAGMENTS (BLOCKS_K * TILES_N)  // of the vectors
#define LOADS ((FRAGMENTS + TEAM_WARPS - 1) / TEAM_WARPS)  // of a lane, 32 at most
#define STAGE (FRAGMENTS * 32)
#define SUMS_AT_ONCE (TILES_N * 8 * STRIDE)
#define RING 2

// An item is a place of new values: two units and a batch row, of WIDTH rows of the product. A block has SHARE items of a team, those of
// BATCH_SHARE batch rows.
#ifdef UNITS
#define WIDTH 8
#define PART ((H + UNITS - 1) / UNITS * CLUSTER)
#define OWN 0
typedef uint4 Sums;
#else
#define WIDTH 2
#define PART ((H + COLUMNS - 1) / COLUMNS * CLUSTER)
#define LEAVING (4 * SHARE_WORDS)
#define OWN (LEAVING + 24 * SHARE)  // words of a team in shared memory: new values on their way, and what they need of memory and of the step before
typedef unsigned Sums;
#endif
#define A_ROW (ROWS / WIDTH)
#define A_SEND (8 / WIDTH)  // items in the 16 bytes that are sent at once
#define BATCH_SHARE ((GROUP_BATCH + CLUSTER - 1) / CLUSTER)
#define SHARE (A_ROW * BATCH_SHARE)
#define ROWS_APART (TEAM_THREADS / A_ROW)  // batch rows from one round to the next; the layout sees to it that this is whole
#define ROUNDS ((SHARE + TEAM_THREADS - 1) / TEAM_THREADS)
#define LEAVING_ROW (A_ROW + 4)  // where rows do not meet in the banks of shared memory
#define SHARE_WORDS (BATCH_SHARE * LEAVING_ROW)  // of a gate's words of all items
#define INBOX (RING * CLUSTER * SHARE)
#define SENDS ((A_ROW / A_SEND * GROUP_BATCH + MULTIPLIERS - 1) / MULTIPLIERS)

// A block's shared memory: the weights that are not in registers; of each team the vectors, the sums that arrive, and backward what is OWN;
// sums before they are sent, of two products; the biases.
struct Places {
    uint4 *weights, *stages;
    Sums* inboxes;
    unsigned *owns, *sums;
    float4* bias;
    Token* tokens;
    int rank, strip, part;

    DEVICE Places(uint4* shared) {
        strip = blockIdx.x % PART / CLUSTER, rank = blockIdx.x % CLUSTER, part = blockIdx.x / PART;
        weights = shared;
        stages = weights + WARPS_M * SHARED_K * 2 * WARP_TILES * 32;
        sums = (unsigned*)(stages + TEAMS * STAGE);
        owns = sums + 2 * SUMS_AT_ONCE;
        inboxes = (Sums*)(owns + TEAMS * OWN);
        bias = (float4*)(inboxes + TEAMS * INBOX);
        tokens = (Token*)bias;
#ifdef UNITS
        tokens = (Token*)(bias + UNITS);
#endif
    }

    DEVICE Token* is_full(int team) const { return tokens + team; }  // the stage, of vectors
    DEVICE Token* is_free(int team) const { return tokens + TEAMS + team; }

    DEVICE void begin() const {  // before anything arrives
        for (int i = threadIdx.x; i < TEAMS * INBOX * (int)(sizeof(Sums) / 4); i += THREADS) ((unsigned*)inboxes)[i] = EMPTY;
        for (int i = threadIdx.x; i < TEAMS * STAGE; i += THREADS) stages[i] = make_uint4(0, 0, 0, 0);
        if (threadIdx.x < TEAMS) begin_token(is_full(threadIdx.x), TEAM_WARPS), begin_token(is_free(threadIdx.x), WARPS_M);
        cluster_barrier();
    }
};

// ---- who multiplies -----------------------------------------------------------------------------------------------------

typedef uint4 Kept[REGISTERS_K ? REGISTERS_K : 1][2][WARP_TILES];

struct Multiplier {
    int thread, warp, lane, r, q;
    uint4* weights;
    DEVICE Multiplier(const Places& at) {
        thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, r = lane >> 2, q = lane & 3;
        weights = at.weights + warp / 4 * SHARED_K * 2 * WARP_TILES * 128;
    }
};

// Where the part of the weights in shared memory is, behind the first one, that four warps multiply by a half of block k.
DEVICE int tile_of(int k, int half, int m) { return (((k - REGISTERS_K) * 2 + half) * WARP_TILES + m) * 128; }

DEVICE void keep(Kept& kept, const Multiplier& self, int k, int m, uint4 first, uint4 second) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 v = half ? second : first;
        if (k < REGISTERS_K) {
            kept[k < REGISTERS_K ? k : 0][half][m] = v;
        } else {
            unsigned* to = (unsigned*)(self.weights + tile_of(k, half, m) + self.warp % 4 * 16 + self.r) + self.q;
            to[0] = v.x, to[32] = v.y, to[256] = v.z, to[288] = v.w;  // rows r, r + 8, r, r + 8
        }
    }
}

// All products of this block's warps, of `steps` steps of each team, and the sums sent to their blocks.
DEVICE void multiply_and_send(const Places& at, const Multiplier& self, const Kept& kept, int steps) {
    Place to[SENDS];  // where this thread's sums go at the first use of the first team's inbox
    int from[SENDS];  // and where it finds them; -1: none
#pragma unroll
    for (int i = 0; i < SENDS; i++) {
        const int item = (self.thread + i * MULTIPLIERS) * A_SEND, n = item / A_ROW;
        to[i] = place_in(at.inboxes + at.rank * SHARE + item % SHARE, min(item / SHARE, CLUSTER - 1));
        from[i] = n < GROUP_BATCH ? n * STRIDE + item % A_ROW * (WIDTH / 2) : -1;
    }
    written_for_wide();
    barrier(0, WARPS_M);
#pragma unroll 1
    for (int turn = 0; turn < steps * TEAMS; turn++) {
        const int use = turn / TEAMS, team = turn % TEAMS;
        float acc[WARP_TILES][TILES_N][4] = {};
        wait_for(at.is_full(team), use & 1);
        const Matrix vectors = matrix_at(at.stages + team * STAGE, 128, 512), weights = matrix_at(self.weights, 1024, 128);
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
        if (self.lane == 0) arrive(at.is_free(team));
        unsigned* sums = at.sums + turn % 2 * SUMS_AT_ONCE;
#pragma unroll
        for (int m = 0; m < WARP_TILES; m++)
#pragma unroll
            for (int n = 0; n < TILES_N; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    sums[(n * 8 + 2 * self.q + e) * STRIDE + (self.warp * WARP_TILES + m) * 8 + self.r] = narrow_sums(acc[m][n][e], acc[m][n][e + 2]);
        barrier(0, WARPS_M);
        const unsigned offset = (team * INBOX + use % RING * CLUSTER * SHARE) * sizeof(Sums);
#pragma unroll
        for (int i = 0; i < SENDS; i++)
            if (from[i] >= 0) send(to[i] + offset, *(const uint4*)(sums + from[i]));
    }
}

// ---- teams --------------------------------------------------------------------------------------------------------------

struct Team {
    int team, thread, warp, lane, rank;
    int group, row0, rows;  // its number among the teams of all parts, its first batch row, how many
    uint4* stage;
    Sums* inbox;
    unsigned* own;
    Token *is_full, *is_free;

    DEVICE Team(const Places& at) {
        thread = threadIdx.x - MULTIPLIERS, team = thread / TEAM_THREADS, thread %= TEAM_THREADS, warp = thread >> 5, lane = thread & 31;
        rank = at.rank, group = at.part * TEAMS + team, row0 = group * GROUP_BATCH, rows = min(GROUP_BATCH, BATCH - row0);
        stage = at.stages + team * STAGE, inbox = at.inboxes + team * INBOX, own = at.owns + team * OWN;
        is_full = at.is_full(team), is_free = at.is_free(team);
    }

    // Of this team's vectors, those of number `step`.
    DEVICE T16* vectors(T16* x, int step) const { return x + slot(step, group); }

    DEVICE void meet() const { barrier(1 + team, TEAM_WARPS); }

    // Of this thread's items, one in a round: which pair of units of the strip they are, an item's batch row of the team's, whether there is one, and
    // its number in this block's share.
    DEVICE int pair() const { return thread % A_ROW; }
    DEVICE int row(int round) const { return rank * BATCH_SHARE + thread / A_ROW + round * ROWS_APART; }
    DEVICE bool is_last(int round) const { return (round + 1) * TEAM_THREADS > SHARE; }
    DEVICE bool has(int round) const { return (!is_last(round) || thread + round * TEAM_THREADS < SHARE) && row(round) < rows; }
    DEVICE int mine(int round) const {
        const int number = thread + round * TEAM_THREADS;
        return is_last(round) ? min(number, SHARE - 1) : number;
    }
};

// Brings this lane's part of the vectors, which begin at `from`, to the stage, and says so when they are all there; bit i of `present` says whether
// load i is of any, which is 0 where not.
DEVICE void bring_vectors(const Team& at, const T16* from, unsigned present, Patience& patience, Pace& pace) {
    const int first = at.warp * 32 + at.lane;
    uint4* to = at.stage + first;
    const uint4* of_lane = (const uint4*)from + first;
    unsigned missing = present;
    patience.renew();
    for (int asked = 0;; asked++) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) bring(to + i * TEAM_THREADS, of_lane + i * TEAM_THREADS, missing >> i & 1);
        missing = 0;
        wait_for_brought();
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            missing |= is_empty(to[i * TEAM_THREADS]) << i;
            if (i % 4 == 3) in_order();  // all at once would need too many registers
        }
        missing &= present;
        if (!any_lane(missing) || !any_lane(patience.lasts())) {
            pace.judge(asked > 0);
            break;
        }
    }
    written_for_wide();
    warp_barrier();
    if (at.lane == 0) arrive(at.is_full);
}

// The sums of item `mine` of this block's share at step `use`, over the blocks of the cluster; `has` says whether there is such an item. For whole
// warps.
DEVICE void receive(float (&sums)[WIDTH], const Team& at, int mine, bool has, int use, Patience& patience) {
    Sums* from = at.inbox + use % RING * CLUSTER * SHARE + mine;
    patience.renew();
    for (;;) {
        bool waits = false;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sums[j] = 0.0f;
#pragma unroll
        for (int p = 0; p < CLUSTER; p++) {
            const Sums v = load_arriving(from + p * SHARE);
            waits |= has && is_empty(v);
            add_sums(sums, v);
        }
        if (!any_lane(waits)) break;
        if (!any_lane(patience.lasts())) {
            sums[0] = __uint_as_float(EMPTY);
            break;
        }
    }
#pragma unroll
    for (int p = 0; p < CLUSTER; p++)
        if (has) make_empty(from + p * SHARE);
}

#ifdef UNITS  // ---- forward --------------------------------------------------------------------------------------------

KERNEL forward(const T16* weights, const T16* b_ih, const T16* b_hh, T16* gates, const T16* h0, const void* c0, T16* x, T16* y,
               float* c, T16* h_last, void* c_last, int is_short, int T, int* trouble, unsigned long long limit) {
    SHARED(shared);
    const Places places(shared);
    copy_words(y, h0, BATCH * H / 2, PART * PARTS);
    const int unit0 = places.strip * UNITS, column0 = places.rank * BLOCKS_K * 32;
    put_bias(places.bias, b_ih, b_hh, unit0);
    places.begin();
    if (threadIdx.x < MULTIPLIERS) {
        take_registers<MULTIPLY_REGISTERS>();
        const Multiplier self(places);
        Kept kept;
#pragma unroll
        for (int k = 0; k < BLOCKS_K; k++)
#pragma unroll
            for (int m = 0; m < WARP_TILES; m++) {
                const int column = column0 + k * 32 + self.q * 2;
                uint4 rows[2];  // units, of each its gates
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    const int row = (self.warp * WARP_TILES + m) * 16 + 2 * self.r + s, unit = unit0 + row / 4;
                    const T16* from = weights + ((long long)(row % 4) * H + unit) * H + column;
                    rows[s].x = load_word(from, column < H && unit < H), rows[s].y = load_word(from + 8, column < H && unit < H);
                    rows[s].z = load_word(from + 16, column + 16 < H && unit < H);
                    rows[s].w = load_word(from + 24, column + 16 < H && unit < H);
                }
                keep(kept, self, k, m, make_uint4(rows[0].x, rows[1].x, rows[0].y, rows[1].y),
                     make_uint4(rows[0].z, rows[1].z, rows[0].w, rows[1].w));
            }
        multiply_and_send(places, self, kept, T);
        cluster_barrier();  // a block that has ended has no shared memory to write to
        return;
    }
    give_registers<TEAM_REGISTERS>();
    const Team at(places);
    Patience patience = {limit, 0, trouble, 0};
    Pace pace;
    unsigned present = 0;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int fragment = at.warp + i * TEAM_WARPS, column = column0 + fragment / TILES_N * 32 + at.lane / 8 * 8;
        present |= (fragment < FRAGMENTS && column < H && fragment % TILES_N * 8 + at.lane % 8 < at.rows) << i;
    }

    bool there[ROUNDS];
    int place[ROUNDS], gate_place[ROUNDS], x_place[ROUNDS];  // of an item's h and c, its first gate, and its words in x, at a step
    float2 cell[ROUNDS];
    unsigned input[ROUNDS][4];
    auto fetch = [&](int t) {  // the gates' sums without h's part
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const T16* from = gates + (long long)t * BATCH * 4 * H + anew(gate_place[i]);
#pragma unroll
            for (int gate = 0; gate < 4; gate++) input[i][gate] = there[i] ? load_once((const unsigned*)(from + gate * H)) : 0;
        }
    };
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int unit = unit0 + at.pair() * 2;
        there[i] = at.has(i) && unit < H;
        place[i] = (at.row0 + at.row(i)) * H + unit, gate_place[i] = (place[i] - unit) * 4 + unit;
        x_place[i] = place_in_vectors(at.row(i), unit);
        cell[i] = make_float2(0.0f, 0.0f);
        if (!there[i]) continue;
        cell[i] = make_float2(state_at(c0, place[i], is_short), state_at(c0, place[i] + 1, is_short));
        *(float2*)(c + place[i]) = cell[i];
        store_shared_word(at.vectors(x, 0) + x_place[i], *(const unsigned*)(h0 + place[i]));
    }
#pragma unroll 1
    for (int t = 0; t < T; t++) {
        if (t) wait_for(at.is_free, (t - 1) & 1);
        pace.hold(t ? PACE : 0);
        bring_vectors(at, at.vectors(x, t) + at.rank * FRAGMENTS * 256, present, patience, pace);
        fetch(t);
        float sums[ROUNDS][WIDTH];
        // sums of places behind the layer nobody waits for: others may overwrite them at any time
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) receive(sums[i], at, at.mine(i), there[i], t, patience);
        unsigned word[ROUNDS], gate_of[ROUNDS][4];
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            float2 of[4];
#pragma unroll
            for (int gate = 0; gate < 4; gate++) {
                const float *added = (const float*)(places.bias + at.pair() * 2) + gate;
                of[gate] = unpacked(input[i][gate]);
                of[gate].x += added[0] + sums[i][gate], of[gate].y += added[4] + sums[i][gate + 4];
                of[gate] = gate == 2 ? make_float2(tangent(of[gate].x), tangent(of[gate].y))
                                     : make_float2(sigmoid(of[gate].x), sigmoid(of[gate].y));
                gate_of[i][gate] = packed(of[gate].x, of[gate].y);
            }
            cell[i].x = of[1].x * cell[i].x + of[0].x * of[2].x, cell[i].y = of[1].y * cell[i].y + of[0].y * of[2].y;
            word[i] = packed(of[3].x * tangent(cell[i].x), of[3].y * tangent(cell[i].y));
            if (there[i] && t + 1 < T)
                store_shared_word(at.vectors(x, t + 1) + anew(x_place[i]), word[i]);
        }
        pace.begin();
        // others wait for x alone: the rest is written after it
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            if (!there[i]) continue;
            const long long step = (long long)(t + 1) * BATCH * H + anew(place[i]);
            store_once((float2*)(c + step), cell[i]);
            store_once((unsigned*)(y + step), word[i]);
            T16* to = gates + (long long)t * BATCH * 4 * H + anew(gate_place[i]);
#pragma unroll
            for (int gate = 0; gate < 4; gate++) store_once((unsigned*)(to + gate * H), gate_of[i][gate]);
            if (t) store_shared_word(at.vectors(x, t - 1) + anew(x_place[i]), EMPTY);
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

// As in lstm.cu; there is no ring. `written` are two numbers, counted up from EMPTY: of teams that have written d_gates of `first` steps, and of
// `second`; `wait_for_steps` waits for them.
KERNEL backward(const T16* weights, const T16* gates, const float* c, const T16* d_h, const T16* d_hT,
                const float* d_cT, T16* x, T16* d_gates, float* d_h0, float* d_c0, unsigned* written, int first, int second, int T,
                int* trouble, unsigned long long limit) {
    SHARED(shared);
    const Places places(shared);
    const int column0 = places.strip * COLUMNS, row_unit0 = places.rank * ROW_UNITS;
    places.begin();
    if (threadIdx.x < MULTIPLIERS) {
        take_registers<MULTIPLY_REGISTERS>();
        const Multiplier self(places);
        Kept kept;
#pragma unroll
        for (int k = 0; k < BLOCKS_K; k++)
#pragma unroll
            for (int m = 0; m < WARP_TILES; m++) {
                unsigned words[2][4];
                const int column = column0 + (self.warp * WARP_TILES + m) * 16 + 2 * self.r;
#pragma unroll
                for (int gate = 0; gate < 4; gate++) {  // two neighbouring units by two neighbouring columns
                    const int unit = row_unit0 + k * 8 + 2 * self.q;
                    const T16* from = weights + ((long long)gate * H + unit) * H + column;
                    const unsigned even = load_word(from, unit < H && column < H);
                    const unsigned odd = load_word(from + H, unit < H && column < H);
                    words[0][gate] = (even & 0xffff) | odd << 16, words[1][gate] = even >> 16 | (odd & 0xffff0000u);
                }
                keep(kept, self, k, m, make_uint4(words[0][0], words[1][0], words[0][1], words[1][1]),
                     make_uint4(words[0][2], words[1][2], words[0][3], words[1][3]));
            }
        multiply_and_send(places, self, kept, T);
        cluster_barrier();  // a block that has ended has no shared memory to write to
        return;
    }
    give_registers<TEAM_REGISTERS>();
    const Team at(places);
    Patience patience = {limit, 0, trouble, 0};
    Pace pace;
    unsigned present = 0;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int fragment = at.warp + i * TEAM_WARPS;
        present |= (fragment < FRAGMENTS && row_unit0 + fragment / TILES_N * 8 < H && fragment % TILES_N * 8 + at.lane % 8 < at.rows) << i;
    }

    // Of all items, for registers are few: what is new, 8 units of a gate together; what the gradients of the gates are made with, see below; the
    // cell's value and its gradient; and of memory the cell's value before, the gates, the gradient of h.
    unsigned* const leaving = at.own;
    float4* const factors = (float4*)(leaving + LEAVING);
    float2 *const cells = (float2*)(factors + 3 * SHARE), *const d_cells = cells + SHARE, *const cells_before = d_cells + SHARE;
    unsigned *const gates_of = (unsigned*)(cells_before + SHARE), *const d_h_of = gates_of + 4 * SHARE, *const above_of = d_h_of + SHARE;
    // Of this thread's first item in memory, h's at a step and the gates'; the others are ROWS_APART rows further on each time.
    const int unit = column0 + at.pair() * 2, place = (at.row0 + at.row(0)) * H + unit, gate_place = 4 * place - 3 * unit;
    auto there = [&](int i) { return at.has(i) && unit < H; };
    auto fetch = [&](int t) {
        const long long step = (long long)t * BATCH * H;
        const T16 *of_gates = gates + 4 * step + anew(gate_place), *above = d_h + step + anew(place);
        const float* before = c + step + anew(place);
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            if (!there(i)) continue;
            const int mine = at.thread + i * TEAM_THREADS;
#pragma unroll
            for (int gate = 0; gate < 4; gate++) bring_word(gates_of + gate * SHARE + mine, of_gates + (4 * i * ROWS_APART + gate) * H);
            bring_word(d_h_of + mine, above + i * ROWS_APART * H), bring_pair(cells_before + mine, before + i * ROWS_APART * H);
        }
    };
    // With d the gradient of h, the gradient of c is d_cell + d * by_h; that of o's pre-activation d * by_o, and those of i, f, g that of c times
    // by_c. These are ready before the sums come.
    auto prepare = [&] {
        wait_for_brought();
#pragma unroll 1
        for (int i = 0; i < ROUNDS; i++) {
            const int mine = anew(at.thread) + i * TEAM_THREADS;
            if (!at.has(i)) continue;
            float2 of[4], by_h, by_o, by_c[3];
#pragma unroll
            for (int gate = 0; gate < 4; gate++) of[gate] = unpacked(gates_of[gate * SHARE + mine]);
            const float2 cell = cells[mine], before = cells_before[mine];
#define EACH(x)                                                    \
    {                                                              \
        const float tanh_c = tangent(cell.x);                      \
        by_h.x = of[3].x * (1.0f - tanh_c * tanh_c);               \
        by_o.x = tanh_c * of[3].x * (1.0f - of[3].x);              \
        by_c[0].x = of[2].x * of[0].x * (1.0f - of[0].x);          \
        by_c[1].x = before.x * of[1].x * (1.0f - of[1].x);         \
        by_c[2].x = of[0].x * (1.0f - of[2].x * of[2].x);          \
    }
            EACH(x)
            EACH(y)
#undef EACH
            factors[mine] = make_float4(by_h.x, by_h.y, by_o.x, by_o.y);
            factors[SHARE + mine] = make_float4(by_c[0].x, by_c[0].y, by_c[1].x, by_c[1].y);
            factors[2 * SHARE + mine] = make_float4(by_c[2].x, by_c[2].y, of[1].x, of[1].y);
            cells[mine] = before, above_of[mine] = d_h_of[mine];
        }
    };
    float sums[ROUNDS][WIDTH];  // the gradients of h
    auto differentiate = [&] {
        unsigned* const to = leaving + anew(at.thread / A_ROW * LEAVING_ROW + at.pair());
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int mine = at.thread + i * TEAM_THREADS;
            if (!at.has(i)) continue;
            const float4 first = factors[mine], second = factors[SHARE + mine], third = factors[2 * SHARE + mine];
            const float2 above = unpacked(above_of[mine]), d_cell = d_cells[mine];
            const float2 d = make_float2(sums[i][0] + above.x, sums[i][1] + above.y);
            const float2 d_c = make_float2(d_cell.x + d.x * first.x, d_cell.y + d.y * first.y);
            d_cells[mine] = make_float2(d_c.x * third.z, d_c.y * third.w);
            const float2 of[4] = {make_float2(d_c.x * second.x, d_c.y * second.y), make_float2(d_c.x * second.z, d_c.y * second.w),
                                  make_float2(d_c.x * third.x, d_c.y * third.y), make_float2(d.x * first.z, d.y * first.w)};
#pragma unroll
            for (int gate = 0; gate < 4; gate++)
                to[gate * SHARE_WORDS + i * ROWS_APART * LEAVING_ROW] = packed(of[gate].x, of[gate].y);
        }
    };
    // This team's pieces of x number `use`, 8 units of a gate each, rows side by side: of what is new, or EMPTY.
    auto put = [&](int use, bool is_new) {
        const int lane = anew(at.lane), gate = lane / 8;
#pragma unroll
        for (int j = 0; j < BATCH_SHARE; j += 8) {
            const int row = j + lane % 8, n = at.rank * BATCH_SHARE + row;
            T16* to = at.vectors(x, use) + place_in_vectors(n, column0 + at.warp * 8, gate);
            const unsigned* from = leaving + gate * SHARE_WORDS + row * LEAVING_ROW + at.warp * 4;
            if (row >= BATCH_SHARE || n >= at.rows) continue;
#pragma unroll
            for (int chunk = 0; chunk < COLUMNS / 8; chunk += TEAM_WARPS) {
                if (chunk + at.warp >= COLUMNS / 8 || (H % COLUMNS && column0 + (chunk + at.warp) * 8 >= H)) continue;
                store_shared_words(to + chunk * TILES_N * 256, is_new ? *(const uint4*)(from + chunk * 4) : make_uint4(EMPTY, EMPTY, EMPTY, EMPTY));
            }
        }
    };
    auto write = [&](int t) {  // what is new, by such pieces too
        const int pair = anew(at.pair()), gate = pair / (A_ROW / 4), chunk = pair % (A_ROW / 4), begin = column0 + chunk * 8;
        T16* to = d_gates + ((long long)t * BATCH + at.row0 + at.row(0)) * 4 * H + anew(gate * H + begin);
        const unsigned* from = leaving + gate * SHARE_WORDS + at.thread / A_ROW * LEAVING_ROW + chunk * 4;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
            if (at.has(i) && begin < H) store_once((uint4*)(to + 4 * i * ROWS_APART * H), *(const uint4*)(from + i * ROWS_APART * LEAVING_ROW));
    };
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        sums[i][0] = sums[i][1] = 0.0f;
        if (!there(i)) continue;
        const int here = place + i * ROWS_APART * H;
        const float2 d = d_hT ? unpacked(*(const unsigned*)(d_hT + here)) : make_float2(0.0f, 0.0f);
        cells[at.mine(i)] = *(const float2*)(c + (long long)T * BATCH * H + here);
        d_cells[at.mine(i)] = d_cT ? *(const float2*)(d_cT + here) : make_float2(0.0f, 0.0f);
        sums[i][0] = d.x, sums[i][1] = d.y;
    }
    fetch(T - 1);
    prepare();
    if (T > 1) fetch(T - 2);
#pragma unroll 1
    for (int t = T - 1; t >= 0; t--) {
        const int use = T - 1 - t;
        differentiate();
        at.meet();
        put(use, true);
        pace.begin();
        if (t) prepare();  // while what others put is on its way
        if (use) wait_for(at.is_free, (use - 1) & 1);
        pace.hold(PACE);
        bring_vectors(at, at.vectors(x, use) + at.rank * FRAGMENTS * 256, present, patience, pace);
        write(t);  // while the product is made, and the sums are on their way
        if (use > 1) put(use - 2, false);
        at.meet();  // all have taken what was leaving, and written it
        if (at.thread == 0 && use + 1 == first) count_for_all(written);
        if (at.thread == 0 && use + 1 == second) count_for_all(written + 1);
        if (t > 1) fetch(t - 2);
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) receive(sums[i], at, at.mine(i), at.has(i), use, patience);
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        if (!there(i)) continue;
        const int here = place + i * ROWS_APART * H;
        *(float2*)(d_h0 + here) = make_float2(sums[i][0], sums[i][1]), *(float2*)(d_c0 + here) = d_cells[at.mine(i)];
    }
    cluster_barrier();  // a block that has ended has no shared memory to write to
}

// One warp that ends when `teams` of a `backward` under way have counted in `written`; d_gates are the gradients that whoever comes behind it reads, NaN
// where it has waited for too long.
KERNEL wait_for_steps(const unsigned* written, int teams, T16* d_gates, int* trouble, unsigned long long limit) {
    Patience patience = {limit, 0, trouble, 0};
    while (load_counted(written) + 1 != teams)
        if (!patience.lasts()) {
            *(unsigned*)d_gates = EMPTY;
            return;
        }
}
#endif
