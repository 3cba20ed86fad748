// The recurrence of an LSTM layer with its weights on the chip, by clusters of blocks that add their sums through shared
// memory (compute capability 9.0). As lstm.cu, of which this differs in who does what:
//
// Both kernels: a cluster owns ROWS rows of the product; its block `rank` multiplies part `rank` of the vector by them,
// and sends each sum to the block that turns it into new values. So every block loads only a part of the vectors from the
// L2 cache, whose bandwidth bounds a step where every block loads all of them. Of what arrives, every word's last bit tells
// one use of its place from the next: a warp that sends sums of step t + RING has vectors that depend on every block's
// having read the sums of step t. So every warp must have some part of the vectors.
//
// A block's warps are WARPS_M by WARPS_K: each has WARP_TILES tiles of rows and BLOCKS_K blocks of 32 k. Vectors pass through
// shared memory, where the WARPS_M warps of a share of k find them; the sums of the WARPS_K warps are added before they are
// sent.
//
// forward: the rows are the gates of UNITS units, the vector is h. backward: the rows are COLUMNS units of h, the vector is
// the gates' gradients, by ROW_UNITS units for each block.
//
// Where WIDE, products are those of groups of four warps (compute capability 9.0): 64 rows by the 8 TILES_N columns of the group.
//
// A block's warps are TEAMS teams, with the same weights and a share of the batch each: while one waits, another works.
//
// Macros: H, BATCH, PARTS, TEAMS or not, GROUPS, GROUP_BATCH, TILES_N, WARPS, HALF as in lstm.cu; CLUSTER, WARPS_M, WARPS_K, WARP_TILES, BLOCKS_K,
// REGISTERS_K, WIDE or not; UNITS = 4 WARPS_M WARP_TILES or COLUMNS = 16 WARPS_M WARP_TILES and ROW_UNITS = 8 WARPS_K BLOCKS_K.

#define TEAM_THREADS (WARPS / TEAMS * 32)
#define ROWS (16 * WARPS_M * WARP_TILES)
#define STRIDE (ROWS + 4)
#define FRAGMENTS (BLOCKS_K * TILES_N)  // of the vectors, of a warp
#define LOADS ((FRAGMENTS + WARPS_M - 1) / WARPS_M)
#define RING 2
// Where warps share k, only one barrier a turn is that of all warps, so one can be a turn ahead of another: what it writes before that
// barrier has two places.
#define PLACES (WARPS_K > 1 ? 2 : 1)
#define SUMS_OF_TEAM (PLACES * WARPS_K * TILES_N * 8 * STRIDE)
#define LAG (GROUPS > 1)  // turns between a group's product and its new values, for the sums to travel

// An item is a place of new values: WIDTH neighbouring rows and a batch row. A block has SHARE items of a group. The
// sums of the forward kernel travel in fp16: they are of moderate size, and of what was rounded to 16 bits.
#ifdef UNITS
#define WIDTH 4
#define PART ((H + UNITS - 1) / UNITS * CLUSTER)
#else
#define WIDTH 2
#define PART ((H + COLUMNS - 1) / COLUMNS * CLUSTER)
#endif
typedef uint2 Sums;
#define A_ROW (ROWS / WIDTH)
#define SHARE ((A_ROW * GROUP_BATCH + 2 * CLUSTER - 1) / (2 * CLUSTER) * 2)
#define ROUNDS ((SHARE + TEAM_THREADS - 1) / TEAM_THREADS)
#define INBOX (RING * GROUPS * CLUSTER * SHARE)
#define QUADS (WIDTH / 2)  // of rows in the 16 bytes that are sent at once
#define SENDS ((ROWS / 4 * GROUP_BATCH / QUADS + TEAM_THREADS - 1) / TEAM_THREADS)

// What a block has of shared memory, and where its warp stands in it.
struct Places {
    uint4 *more, *stage;
    float* sums;
    Sums* inbox;
    int thread, warp, lane, r, q, m, k, rank, strip;
    int row, chunk;  // of a fragment of the vectors, what this lane loads
    int team, first_group, row0;  // the first group and batch row of this part's team
    Place to[SENDS];  // where this thread's sums go at the first use of the inbox

    DEVICE Places(uint4* shared) {
        team = threadIdx.x / TEAM_THREADS, thread = threadIdx.x % TEAM_THREADS, warp = thread >> 5, lane = thread & 31, r = lane >> 2, q = lane & 3;
        strip = blockIdx.x % PART / CLUSTER, first_group = (blockIdx.x / PART * TEAMS + team) * GROUPS;
        row0 = first_group * GROUP_BATCH;
        m = warp % WARPS_M, k = warp / WARPS_M, rank = blockIdx.x % CLUSTER;
        row = WIDE ? lane & 7 : r, chunk = WIDE ? lane >> 3 : q;
#if WIDE
        more = shared + warp / 4 * SHARED_K * 2 * WARP_TILES * 128;
#else
        more = shared + warp * SHARED_K * 2 * WARP_TILES * 32 + lane;
#endif
        stage = shared + WARPS / TEAMS * SHARED_K * 2 * WARP_TILES * 32;
        sums = (float*)(stage + TEAMS * WARPS_K * FRAGMENTS * 32) + team * SUMS_OF_TEAM;
        inbox = (Sums*)(sums + (TEAMS - team) * SUMS_OF_TEAM) + team * INBOX;
        stage += team * WARPS_K * FRAGMENTS * 32;
    }

    DEVICE void begin() {  // before anything arrives
        for (int i = thread; i < INBOX * (int)(sizeof(Sums) / 4); i += TEAM_THREADS) ((float*)inbox)[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < SENDS; i++) {
            const int item = (thread + i * TEAM_THREADS) * 2;
            Sums* place = inbox + rank * SHARE + item % SHARE;
            to[i] = place_in(place, min(item / SHARE, CLUSTER - 1));
        }
        cluster_barrier();
    }

    // Of the exchanged vectors, what this lane's loads begin with.
    DEVICE int first_load() { return (((rank * WARPS_K + k) * FRAGMENTS + m) * 32 + lane) * 8; }

    // Batch rows of a group of this part.
    DEVICE int rows_of(int g) const { return min(GROUP_BATCH, BATCH - row0 - g * GROUP_BATCH); }

    // Of the warps of this team; and of those of them with the same share of k.
    DEVICE void meet() const {
        if (TEAMS > 1) barrier(TEAMS * WARPS_K + team, WARPS / TEAMS);
        else barrier();
    }
    DEVICE void meet_of_k() const { barrier(team * WARPS_K + k, WARPS_M); }

    // Behind the weights' way to shared memory, which the first team brings there.
    DEVICE void weights_are_there() const {
        if (TEAMS == 1) return;
#if WIDE
        written_for_wide();
#endif
        barrier();
    }

    DEVICE int turn_of(int use, int g) { return (use % RING * GROUPS + g) * CLUSTER * SHARE; }
};

typedef uint4 Kept[REGISTERS_K ? REGISTERS_K : 1][2][WARP_TILES];

#if WIDE
// The part of the weights in shared memory that four warps multiply by a half of block k.
DEVICE uint4* tile_of(const Places& at, int k, int half, int m) {
    return at.more + (((k - REGISTERS_K) * 2 + half) * WARP_TILES + m) * 128;
}

DEVICE void keep(Kept& kept, const Places& at, int k, int m, uint4 first, uint4 second) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 v = half ? second : first;
        if (k < REGISTERS_K) {
            kept[k < REGISTERS_K ? k : 0][half][m] = v;
        } else if (!at.team) {
            unsigned* to = (unsigned*)(tile_of(at, k, half, m) + at.warp % 4 * 16 + at.r) + at.q;
            to[0] = v.x, to[32] = v.y, to[256] = v.z, to[288] = v.w;  // rows r, r + 8, r, r + 8
        }
    }
}
#else
DEVICE void keep(Kept& kept, const Places& at, int k, int m, uint4 first, uint4 second) {
    if (k < REGISTERS_K) {
        kept[k < REGISTERS_K ? k : 0][0][m] = first, kept[k < REGISTERS_K ? k : 0][1][m] = second;
    } else if (!at.team) {
        at.more[((k - REGISTERS_K) * 2 * WARP_TILES + m) * 32] = first;
        at.more[(((k - REGISTERS_K) * 2 + 1) * WARP_TILES + m) * 32] = second;
    }
}
#endif

// Asks for what this lane loads of the vectors of a group of `batch_rows`, which begins at `from`; bit i of `present` says whether load
// i is of any.
DEVICE void ask(uint4 (&words)[LOADS], const Places& at, const T16* from, unsigned present, int batch_rows) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int row = (at.m + i * WARPS_M) % TILES_N * 8 + at.row;
        words[i] = make_uint4(0, 0, 0, 0);
        reload_shared_words(words[i], from + i * WARPS_M * 256, present >> i & 1 && row < batch_rows);
    }
}

// The turn of group g: this block's part of the sums, sent to their blocks. The words were asked for at `from`; when they are all
// there and their place is free, `meanwhile` is called.
template <class Meanwhile>
DEVICE void multiply_and_send(Places& at, const Kept& kept, uint4 (&words)[LOADS], const T16* from, int use, int g,
                              Patience& patience, Pace& pace, Meanwhile meanwhile) {
    patience.renew();
    for (bool too_early = false;; too_early = true) {
        bool waits = false;
#pragma unroll
        for (int i = 0; i < LOADS; i++) waits |= is_empty(words[i]);
        if (!any_lane(waits) || !any_lane(patience.lasts())) {
            pace.judge(too_early);
            break;
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) reload_shared_words(words[i], from + i * WARPS_M * 256, is_empty(words[i]));
    }
    const int odd = (use * GROUPS + g) % PLACES;
    uint4* stage = at.stage + at.k * FRAGMENTS * 32 + at.lane;
#pragma unroll
    for (int i = 0; i < LOADS; i++)
        if (at.m + i * WARPS_M < FRAGMENTS) stage[(at.m + i * WARPS_M) * 32] = words[i];
    float acc[WARP_TILES][TILES_N][4] = {};
#if WIDE
    written_for_wide();
    at.meet_of_k();
    wide_begin(acc);
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Matrix b = matrix_at(at.stage + (at.k * FRAGMENTS + k * TILES_N) * 32 + half * 16, 128, 512);
#pragma unroll
            for (int m = 0; m < WARP_TILES; m++)
                if (k < REGISTERS_K) multiply_wide(acc[m], kept[k < REGISTERS_K ? k : 0][half][m], b);
                else multiply_wide(acc[m], matrix_at(tile_of(at, k, half, m), 1024, 128), b);
        }
    wide_end();
    meanwhile();
    wide_wait(acc);
#else
    at.meet_of_k();
    meanwhile();
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
        uint4 vectors[TILES_N];
#pragma unroll
        for (int n = 0; n < TILES_N; n++) vectors[n] = stage[(k * TILES_N + n) * 32];
        product<WARP_TILES>(acc, kept, at.more, vectors, k);
    }
#endif
    const unsigned bit = (use / RING + 1) & 1, offset = at.turn_of(use, g) * sizeof(Sums);
    float* sums = at.sums + odd * WARPS_K * TILES_N * 8 * STRIDE;
    put_sums<WARP_TILES, STRIDE>(sums + at.k * TILES_N * 8 * STRIDE + at.m * WARP_TILES * 16, acc, at.lane);
    at.meet();
    pace.begin();
#pragma unroll
    for (int i = 0; i < SENDS; i++) {
        const int quad = (at.thread + i * TEAM_THREADS) * QUADS, n = quad / (ROWS / 4), m = quad % (ROWS / 4) * 4;
        if (quad < ROWS / 4 * at.rows_of(g)) {
            const float4 x = sum_of_warps<WARPS_K, STRIDE>(sums, n, m);
#ifdef UNITS
            const float4 z = sum_of_warps<WARPS_K, STRIDE>(sums, n, m + 4);
            send(at.to[i] + offset, make_uint4(marked(halves(x.x, x.y), bit), marked(halves(x.z, x.w), bit),
                                               marked(halves(z.x, z.y), bit), marked(halves(z.z, z.w), bit)));
#else
            send(at.to[i] + offset, make_uint4(marked(x.x, bit), marked(x.y, bit), marked(x.z, bit), marked(x.w, bit)));
#endif
        }
    }
}

DEVICE bool arrived(uint2 v, unsigned bit) { return (v.x & 1) == bit && (v.y & 1) == bit; }

// The blocks' parts of item `mine` of this block.
DEVICE void receive(Sums (&parts)[CLUSTER], Places& at, int mine, int use, int g, Patience& patience) {
    const unsigned bit = (use / RING + 1) & 1;
    const Sums* from = at.inbox + at.turn_of(use, g) + mine;
#pragma unroll
    for (int p = 0; p < CLUSTER; p++) parts[p] = load_arriving(from + p * SHARE);
    patience.renew();
    for (bool waits = true; waits;) {
        waits = false;
#pragma unroll
        for (int p = 0; p < CLUSTER; p++)
            if (!arrived(parts[p], bit)) parts[p] = load_arriving(from + p * SHARE), waits = true;
        if (waits && !patience.lasts()) {
            parts[0].x = parts[0].y = EMPTY;
            waits = false;
        }
    }
}

#ifdef UNITS  // ---- forward --------------------------------------------------------------------------------------------

KERNEL forward(const T16* weights, const T16* b_ih, const T16* b_hh, T16* gates, const T16* h0, const void* c0, T16* x, T16* y,
               float* c, T16* h_last, void* c_last, int is_short, int T, int* trouble, unsigned long long limit) {
    SHARED(shared);
    Places at(shared);
    T16* h = y + BATCH * H;
    x += (long long)at.first_group * VECTORS;
    copy_words(y, h0, BATCH * H / 2, PART * PARTS);
    const int unit0 = at.strip * UNITS, column0 = at.rank * WARPS_K * BLOCKS_K * 32;
    Patience patience = {limit, 0, trouble, 0};
    float4* bias = (float4*)(at.inbox + (TEAMS - at.team) * INBOX);
    put_bias(bias, b_ih, b_hh, unit0);
    at.begin();

    Kept kept;
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
        const int column = column0 + (at.k * BLOCKS_K + k) * 32 + at.q * (WIDE ? 2 : 8);
#pragma unroll
        for (int m = 0; m < WARP_TILES; m++) {
            uint4 rows[2];  // units, of each its gates
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const int row = (at.m * WARP_TILES + m) * 16 + 2 * at.r + s, unit = unit0 + row / 4;
                const T16* from = weights + ((long long)(row % 4) * H + unit) * H + column;
#if WIDE
                rows[s].x = load_word(from, column < H && unit < H), rows[s].y = load_word(from + 8, column < H && unit < H);
                rows[s].z = load_word(from + 16, column + 16 < H && unit < H);
                rows[s].w = load_word(from + 24, column + 16 < H && unit < H);
#else
                rows[s] = load_words(from, column < H && unit < H);
#endif
            }
            keep(kept, at, k, m, make_uint4(rows[0].x, rows[1].x, rows[0].y, rows[1].y),
                 make_uint4(rows[0].z, rows[1].z, rows[0].w, rows[1].w));
        }
    }
    at.weights_are_there();
    unsigned present = 0;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int fragment = at.m + i * WARPS_M, column = column0 + (at.k * BLOCKS_K + fragment / TILES_N) * 32 + at.chunk * 8;
        present |= (fragment < FRAGMENTS && column < H) << i;
    }
    Pace pace;

    const int odd = at.thread & 1;  // whether the second of two neighbouring units; each deals with the memory of two gates of both
    unsigned input[ROUNDS][2];
    float cell[ROUNDS] = {};
    auto fetch = [&](int t, int g) {  // what the new values of group g at step t need of memory
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int mine = at.thread + i * TEAM_THREADS, item = at.rank * SHARE + mine;
            const int n = item / A_ROW, b = at.row0 + g * GROUP_BATCH + n, unit = unit0 + item % A_ROW;
            const bool there = mine < SHARE && n < GROUP_BATCH && b < BATCH && unit < H;
            const T16* place = gates + ((long long)t * BATCH + b) * 4 * H + unit - odd + 2 * odd * H;
#pragma unroll
            for (int j = 0; j < 2; j++) input[i][j] = there ? *(const unsigned*)(place + j * H) : 0;
            if (there && (t == 0 || GROUPS > 1)) cell[i] = c[((long long)t * BATCH + b) * H + unit];
        }
    };
    for (int g = 0; g < GROUPS; g++)
        for (int mine = at.thread; mine < SHARE; mine += TEAM_THREADS) {
            const int item = at.rank * SHARE + mine, n = item / A_ROW, b = at.row0 + g * GROUP_BATCH + n, unit = unit0 + item % A_ROW;
            if (n >= GROUP_BATCH || b >= BATCH || unit >= H) continue;
            c[b * H + unit] = state_at(c0, b * H + unit, is_short);
            if (!(unit & 1)) store_shared_word(x + g * VECTORS + place_in_vectors(n, unit), *(const unsigned*)(h0 + b * H + unit));
        }
    if (!LAG) fetch(0, 0);

    uint4 words[LOADS];
    auto ask_for = [&](int turn) {
        const T16* from = x + ((long long)(turn / GROUPS) * ALL_GROUPS + turn % GROUPS) * VECTORS + at.first_load();
        ask(words, at, from, present, at.rows_of(turn % GROUPS));
        return from;
    };
    const T16* from = LAG ? ask_for(0) : 0;
#pragma unroll 1
    for (int turn = 0; turn < T * GROUPS + LAG; turn++) {
        const int t = (turn - LAG) / GROUPS, g = (turn - LAG) % GROUPS;  // of the new values
        if (turn < T * GROUPS) {
            pace.hold(turn ? PACE : 0);
            if (!LAG) from = ask_for(turn);
            multiply_and_send(at, kept, words, from, turn / GROUPS, turn % GROUPS, patience, pace, [&] {
                if (LAG && turn + 1 < T * GROUPS) from = ask_for(turn + 1);
                if (LAG && turn) fetch(t, g);
            });
        } else {
            fetch(t, g);
        }
        if (turn < LAG) continue;
        unsigned gate_words[ROUNDS][2], word[ROUNDS];
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int mine = at.thread + i * TEAM_THREADS, item = at.rank * SHARE + mine;
            const int n = item / A_ROW, b = at.row0 + g * GROUP_BATCH + n, unit = unit0 + item % A_ROW;
            const bool there = mine < SHARE && n < GROUP_BATCH && b < BATCH && unit < H;
            const float4 added = bias[item % A_ROW];
            const unsigned other[2] = {from_neighbour(input[i][0]), from_neighbour(input[i][1])};
            float sum[4] = {added.x, added.y, added.z, added.w};
#pragma unroll
            for (int gate = 0; gate < 4; gate++) {
                const unsigned both = odd == gate >> 1 ? input[i][gate & 1] : other[gate & 1];
                sum[gate] += odd ? unpacked(both).y : unpacked(both).x;
            }
            if (there) {
                Sums parts[CLUSTER];
                receive(parts, at, mine, t, g, patience);
#pragma unroll
                for (int p = 0; p < CLUSTER; p++) {
                    const float2 low = from_halves(parts[p].x), high = from_halves(parts[p].y);
                    sum[0] += low.x, sum[1] += low.y, sum[2] += high.x, sum[3] += high.y;
                }
            }
            const float in = sigmoid(sum[0]), forget = sigmoid(sum[1]), value = tangent(sum[2]), out = sigmoid(sum[3]);
            cell[i] = forget * cell[i] + in * value;
            const float now = out * tangent(cell[i]), next = from_neighbour(now);
            word[i] = packed(now, next);
            if (there && !(item & 1) && t + 1 < T)
                store_shared_word(x + ((long long)(t + 1) * ALL_GROUPS + g) * VECTORS + place_in_vectors(n, unit), word[i]);
            const float theirs[2] = {odd ? in : value, odd ? forget : out}, ours[2] = {odd ? value : in, odd ? out : forget};
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float of_neighbour = from_neighbour(theirs[j]);
                gate_words[i][j] = odd ? packed(of_neighbour, ours[j]) : packed(ours[j], of_neighbour);
            }
        }
        // others wait for x alone: the rest is written after it
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int mine = at.thread + i * TEAM_THREADS, item = at.rank * SHARE + mine;
            const int n = item / A_ROW, b = at.row0 + g * GROUP_BATCH + n, unit = unit0 + item % A_ROW;
            if (mine < SHARE && n < GROUP_BATCH && b < BATCH && unit < H) {
                const long long place = ((long long)t * BATCH + b) * H + unit;
                c[place + BATCH * H] = cell[i];
                if (!(item & 1)) *(unsigned*)(h + place) = word[i];
                T16* of_pair = gates + (place - unit) * 4 + unit - odd + 2 * odd * H;
                *(unsigned*)of_pair = gate_words[i][0], *(unsigned*)(of_pair + H) = gate_words[i][1];
            }
        }
        if (!LAG && turn + 1 < T) fetch(turn + 1, 0);
    }
    for (int g = 0; g < GROUPS; g++)  // the last state: each thread copies what it wrote
        for (int mine = at.thread; mine < SHARE; mine += TEAM_THREADS) {
            const int item = at.rank * SHARE + mine, n = item / A_ROW, b = at.row0 + g * GROUP_BATCH + n, unit = unit0 + item % A_ROW;
            if (n < GROUP_BATCH && b < BATCH && unit < H) copy_last(h_last, c_last, is_short, y, c, T, b * H + unit);
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
    x += (long long)at.first_group * VECTORS;
    const int column0 = at.strip * COLUMNS, row_unit0 = at.rank * ROW_UNITS;
    Patience patience = {limit, 0, trouble, 0};
    at.begin();

    Kept kept;
#pragma unroll
    for (int k = 0; k < BLOCKS_K; k++) {
#pragma unroll
        for (int m = 0; m < WARP_TILES; m++) {
            unsigned words[2][4];
            const int column = column0 + (at.m * WARP_TILES + m) * 16 + 2 * at.r;
#pragma unroll
            for (int e = 0; e < 4; e++) {  // two neighbouring units by two neighbouring columns
                const int chunk = (at.k * BLOCKS_K + k) * 4 + (WIDE ? e : at.q), unit = row_unit0 + chunk_unit(chunk);
                const T16* from = weights + ((long long)chunk_gate(chunk) * H + unit + 2 * (WIDE ? at.q : e)) * H + column;
                const unsigned even = load_word(from, unit < H && column < H);
                const unsigned odd = load_word(from + H, unit < H && column < H);
                words[0][e] = (even & 0xffff) | odd << 16, words[1][e] = even >> 16 | (odd & 0xffff0000u);
            }
            keep(kept, at, k, m, make_uint4(words[0][0], words[1][0], words[0][1], words[1][1]),
                 make_uint4(words[0][2], words[1][2], words[0][3], words[1][3]));
        }
    }
    at.weights_are_there();
    unsigned present = 0;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int fragment = at.m + i * WARPS_M;
        const int chunk = (at.k * BLOCKS_K + fragment / TILES_N) * 4 + at.chunk;
        present |= (fragment < FRAGMENTS && row_unit0 + chunk_unit(chunk) < H) << i;
    }
    Pace pace;

    // With d the gradient of h, the gradient of c is d_cell + d * by_h; that of o's pre-activation d * by_o, and those of
    // i, f, g that of c times by_c.
    float2 by_h[ROUNDS], by_o[ROUNDS], by_c[ROUNDS][3], forget[ROUNDS], d_above[ROUNDS], d_cell[ROUNDS];
    unsigned gates_of[ROUNDS][4], d_h_of[ROUNDS];
    float2 cell[ROUNDS], cell_before[ROUNDS];
    auto fetch = [&](int t, int g) {  // what the gradients of group g's gates at step t need of memory
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int mine = at.thread + i * TEAM_THREADS, item = at.rank * SHARE + mine;
            const int n = item / A_ROW, b = at.row0 + g * GROUP_BATCH + n, unit = column0 + item % A_ROW * 2;
            if (mine >= SHARE || n >= GROUP_BATCH || b >= BATCH || unit >= H) continue;
            const long long place = ((long long)t * BATCH + b) * H + unit;
#pragma unroll
            for (int gate = 0; gate < 4; gate++)
                gates_of[i][gate] = *(const unsigned*)(gates + (place - unit) * 4 + gate * H + unit);
            d_h_of[i] = *(const unsigned*)(d_h + place);
            cell[i] = *(const float2*)(c + place + BATCH * H);
            cell_before[i] = *(const float2*)(c + place);
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
    // The gradients of the gates of group g at step t, from what has arrived of step t + 1; for t < 0 those of the first state.
    auto differentiate = [&](int t, int g) {
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int mine = at.thread + i * TEAM_THREADS, item = at.rank * SHARE + mine;
            const int n = item / A_ROW, b = at.row0 + g * GROUP_BATCH + n, unit = column0 + item % A_ROW * 2;
            if (mine >= SHARE || n >= GROUP_BATCH || b >= BATCH || unit >= H) continue;
            if (t >= 0) prepare(i);
            float2 d = make_float2(0.0f, 0.0f);
            if (t == T - 1) {
                if (d_hT) d = unpacked(*(const unsigned*)(d_hT + b * H + unit));
            } else {
                Sums parts[CLUSTER];
                receive(parts, at, mine, T - 2 - t, g, patience);
#pragma unroll
                for (int p = 0; p < CLUSTER; p++) d.x += __uint_as_float(parts[p].x), d.y += __uint_as_float(parts[p].y);
            }
            if (t < 0) {
                *(float2*)(d_h0 + b * H + unit) = d;
                if (GROUPS == 1) *(float2*)(d_c0 + b * H + unit) = d_cell[i];
                continue;
            }
            d.x += d_above[i].x, d.y += d_above[i].y;
            const float2 d_c = make_float2(d_cell[i].x + d.x * by_h[i].x, d_cell[i].y + d.y * by_h[i].y);
            T16* to = x + ((long long)t * ALL_GROUPS + g) * VECTORS + place_in_vectors(n, unit, 0);
            T16* place = d_gates + ((long long)t * BATCH + b) * 4 * H + unit;
            unsigned words[4];
#pragma unroll
            for (int gate = 0; gate < 3; gate++)
                words[gate] = packed(d_c.x * by_c[i][gate].x, d_c.y * by_c[i][gate].y);
            words[3] = packed(d.x * by_o[i].x, d.y * by_o[i].y);
#pragma unroll
            for (int gate = 0; gate < 4; gate++)
                store_shared_word(to + (gate >> 1) * TILES_N * 256 + (gate & 1) * 8 * LANE(0, 2), words[gate]);
            // others wait for these alone
#pragma unroll
            for (int gate = 0; gate < 4; gate++) *(unsigned*)(place + gate * H) = words[gate];
            d_cell[i] = make_float2(d_c.x * forget[i].x, d_c.y * forget[i].y);
            if (GROUPS > 1) *(float2*)(d_c0 + b * H + unit) = d_cell[i];
        }
    };
#pragma unroll 1
    for (int g = 0; g < GROUPS; g++) fetch(T - 1, g), differentiate(T - 1, g);
    if (!LAG && T > 1) fetch(T - 2, 0);

    uint4 words[LOADS];
    auto ask_for = [&](int turn) {
        const T16* from = x + ((long long)(T - 1 - turn / GROUPS) * ALL_GROUPS + turn % GROUPS) * VECTORS + at.first_load();
        ask(words, at, from, present, at.rows_of(turn % GROUPS));
        return from;
    };
    const T16* from = LAG ? ask_for(0) : 0;
#pragma unroll 1
    for (int turn = 0; turn < T * GROUPS + LAG; turn++) {
        const int t = T - 2 - (turn - LAG) / GROUPS, g = (turn - LAG) % GROUPS;  // of the gradients
        if (turn < T * GROUPS) {
            pace.hold(turn ? PACE : 0);
            if (!LAG) from = ask_for(turn);
            multiply_and_send(at, kept, words, from, turn / GROUPS, turn % GROUPS, patience, pace, [&] {
                if (LAG && turn + 1 < T * GROUPS) from = ask_for(turn + 1);
                if (LAG && turn && t >= 0) fetch(t, g);
            });
        }
        if (turn < LAG) continue;
        differentiate(t, g);
        if (!LAG && t > 0) fetch(t - 1, 0);
    }
    cluster_barrier();  // a block that has ended has no shared memory to write to
}
#endif
