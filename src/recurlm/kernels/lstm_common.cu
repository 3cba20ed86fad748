// What the LSTM kernels share; compiled in front of each of them.

typedef unsigned short T16;

#ifdef CLUSTER
#define WIDE 1  // products are those of groups of four warps
#else
#define WIDE 0
#define TEAMS 1
#endif

#ifndef ON_CPU  // the tests bring these for a CPU
#define KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
#define DEVICE __device__ __forceinline__

#define SHARED(name) extern __shared__ uint4 name[]
#if HALF
#define KIND "f16"
#else
#define KIND "bf16"
#endif

DEVICE void barrier() { __syncthreads(); }

// Of `warps` warps that meet as number `group`.
DEVICE void barrier(int group, int warps) { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(32 * warps) : "memory"); }

// 16 bytes that other blocks may be writing, where `wanted`, without a branch: past the L1 cache, each 4-byte word whole.
DEVICE void reload_shared_words(uint4& v, const void* p, bool wanted) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"((unsigned)wanted) : "memory");
}

// Words that nobody is writing, or 0 where they are not `wanted`, without a branch.
DEVICE uint4 load_words(const void* p, bool wanted) {
    uint4 v;
    asm("{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0; "
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"((unsigned)wanted));
    return v;
}

DEVICE unsigned load_word(const void* p, bool wanted) {
    unsigned v;
    asm("{.reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.global.nc.u32 %0, [%1];}"
        : "=&r"(v) : "l"(p), "r"((unsigned)wanted));
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

DEVICE void store_shared_words(void* p, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

#ifdef CLUSTER
// All threads of the cluster's blocks.
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

// A place in the shared memory of a block of this cluster.
typedef unsigned Place;

// Where `p` is in that of block `rank`.
DEVICE Place place_in(void* p, unsigned rank) {
    Place there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(rank));
    return there;
}

// Each 4-byte word whole.
DEVICE void send(Place to, uint4 v) {
    asm volatile("st.relaxed.cluster.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Words of this block's shared memory that the cluster's blocks may be writing.
DEVICE uint4 load_arriving(const uint4* p) {
    uint4 v;
    asm volatile("ld.relaxed.cluster.shared::cta.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"((unsigned)__cvta_generic_to_shared(p)) : "memory");
    return v;
}

DEVICE unsigned load_arriving(const unsigned* p) {
    unsigned v;
    asm volatile("ld.relaxed.cluster.shared::cta.u32 %0, [%1];" : "=r"(v) : "r"((unsigned)__cvta_generic_to_shared(p)) : "memory");
    return v;
}

// Words that are needed once: they leave the caches before others.
DEVICE unsigned load_once(const unsigned* p) { return __ldcs(p); }
DEVICE void store_once(unsigned* p, unsigned v) { __stcs(p, v); }
DEVICE void store_once(float2* p, float2 v) { __stcs(p, v); }
DEVICE void store_once(uint4* p, uint4 v) { __stcs(p, v); }

// 16 bytes from the L2 cache to shared memory where they are `wanted`; there after the next `wait_for_brought`.
DEVICE void bring(void* to, const void* from, bool wanted) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}"
                 ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"((unsigned)wanted) : "memory");
}
DEVICE void bring_word(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
DEVICE void bring_pair(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
DEVICE void wait_for_brought() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Of this block, in shared memory: passed each time when `count` have arrived at it.
typedef unsigned long long Token;
DEVICE void begin_token(Token* token, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"((unsigned)__cvta_generic_to_shared(token)), "r"(count) : "memory");
}
DEVICE void arrive(Token* token) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0];}" ::"r"((unsigned)__cvta_generic_to_shared(token)) : "memory");
}
// Until it has been passed an odd number of times (odd = 0: the first, third, ...), or an even one (1).
DEVICE void wait_for(Token* token, unsigned odd) {
    asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again;}"
                 ::"r"((unsigned)__cvta_generic_to_shared(token)), "r"(odd) : "memory");
}
DEVICE void warp_barrier() { __syncwarp(); }

// One more in a number that all blocks add to, behind all that this thread and those that it met have written.
DEVICE void count_for_all(unsigned* number) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(number) : "memory"); }
DEVICE unsigned load_counted(const unsigned* number) {
    unsigned v;
    asm volatile("nanosleep.u32 100; ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(number) : "memory");
    return v;
}

// v, of which the compiler knows nothing: what is computed from it is so each time, and not kept in registers.
DEVICE int anew(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

// What is before in the text is before in time.
DEVICE void in_order() { asm volatile("" ::: "memory"); }

// Registers of each thread of four neighbouring warps, all of which call this.
template <int COUNT>
DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
#endif

#if WIDE
// A matrix in shared memory for groups of four warps: parts of 8 rows by 8 k lie together, row by row; the next 8 k are `k_bytes` on, the
// next 8 rows `row_bytes`.
typedef unsigned long long Matrix;
DEVICE Matrix matrix_at(const void* p, int k_bytes, int row_bytes) {
    const unsigned place = anew((unsigned)__cvta_generic_to_shared(p));
    return (Matrix)((place & 0x3ffff) >> 4) | (Matrix)(k_bytes >> 4) << 16 | (Matrix)(row_bytes >> 4) << 32;
}
DEVICE Matrix further(Matrix matrix, int bytes) { return matrix + (bytes >> 4); }

#define SUM(n) "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])
#define TEN(d) "%" #d "0, %" #d "1, %" #d "2, %" #d "3, %" #d "4, %" #d "5, %" #d "6, %" #d "7, %" #d "8, %" #d "9"
#if TILES_N == 3
#define SUMS SUM(0), SUM(1), SUM(2)
#define SHAPE "m64n24k16"
#define SUMS_TEXT TEN() ", %10, %11"
#define ONE_TEXT "%12"
#define TWO_TEXT "%13"
#define FOUR_TEXT "{%12, %13, %14, %15}"
#define FIFTH_TEXT "%16"
#elif TILES_N == 4
#define SUMS SUM(0), SUM(1), SUM(2), SUM(3)
#define SHAPE "m64n32k16"
#define SUMS_TEXT TEN() ", %10, %11, %12, %13, %14, %15"
#define ONE_TEXT "%16"
#define TWO_TEXT "%17"
#define FOUR_TEXT "{%16, %17, %18, %19}"
#define FIFTH_TEXT "%20"
#elif TILES_N == 5
#define SUMS SUM(0), SUM(1), SUM(2), SUM(3), SUM(4)
#define SHAPE "m64n40k16"
#define SUMS_TEXT TEN() ", " TEN(1)
#define ONE_TEXT "%20"
#define TWO_TEXT "%21"
#define FOUR_TEXT "{%20, %21, %22, %23}"
#define FIFTH_TEXT "%24"
#elif TILES_N == 8
#define SUMS SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)
#define SHAPE "m64n64k16"
#define SUMS_TEXT TEN() ", " TEN(1) ", " TEN(2) ", %30, %31"
#define ONE_TEXT "%32"
#define TWO_TEXT "%33"
#define FOUR_TEXT "{%32, %33, %34, %35}"
#define FIFTH_TEXT "%36"
#else  // 10
#define SUMS SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7), SUM(8), SUM(9)
#define SHAPE "m64n80k16"
#define SUMS_TEXT TEN() ", " TEN(1) ", " TEN(2) ", " TEN(3)
#define ONE_TEXT "%40"
#define TWO_TEXT "%41"
#define FOUR_TEXT "{%40, %41, %42, %43}"
#define FIFTH_TEXT "%44"
#endif
#define WIDE_PRODUCT \
    "{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned." SHAPE ".f32." KIND "." KIND " {" SUMS_TEXT "}, "

// acc += a b for 64 rows, of which each of four warps has 16, and 8 TILES_N columns; under way until `wide_wait`.
DEVICE void multiply_wide(float (&acc)[TILES_N][4], uint4 a, Matrix b) {
    asm volatile(WIDE_PRODUCT FOUR_TEXT ", " FIFTH_TEXT ", p, 1, 1, 0;}" : SUMS : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
}
DEVICE void multiply_wide(float (&acc)[TILES_N][4], Matrix a, Matrix b) {
    asm volatile(WIDE_PRODUCT ONE_TEXT ", " TWO_TEXT ", p, 1, 1, 0, 0;}" : SUMS : "l"(a), "l"(b));
}

// What this thread wrote to shared memory is there for wide products behind the next barrier.
DEVICE void written_for_wide() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The compiler keeps acc as it is here.
template <int TILES_M>
DEVICE void pin(float (&acc_of)[TILES_M][TILES_N][4]) {
#pragma unroll
    for (int m = 0; m < TILES_M; m++) {
        float(&acc)[TILES_N][4] = acc_of[m];
        asm volatile("" : SUMS::"memory");
    }
}
template <int TILES_M>
DEVICE void wide_begin(float (&acc)[TILES_M][TILES_N][4]) {
    pin(acc);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void wide_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int TILES_M>
DEVICE void wide_wait(float (&acc)[TILES_M][TILES_N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(acc);
}
#endif

// Two numbers in fp16 in a word.
DEVICE unsigned halves(float low, float high) {
    unsigned v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

DEVICE float2 from_halves(unsigned v) {
    float2 x;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(x.x), "=f"(x.y) : "r"(v));
    return x;
}

DEVICE float from_neighbour(float v) { return __shfl_xor_sync(0xffffffffu, v, 1); }
DEVICE bool any_lane(bool v) { return __any_sync(0xffffffffu, v); }

DEVICE unsigned cycles() {
    unsigned t;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(t)::"memory");
    return t;
}

DEVICE unsigned long long nanoseconds() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

DEVICE float sigmoid(float x) {  // 1 / (1 + 2^(-x log2 e)); the hardware's 2^x and 1/x, of which 22 bits are right
    float e, y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950408889634f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + e));
    return y;
}

#if HALF
DEVICE unsigned packed(float low, float high) { return halves(low, high); }
DEVICE float2 unpacked(unsigned v) { return from_halves(v); }
#else
DEVICE unsigned packed(float low, float high) {
    unsigned v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
DEVICE float2 unpacked(unsigned v) { return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)); }
#endif

DEVICE float widened(T16 v) { return unpacked(v).x; }
DEVICE T16 narrowed(float x) { return (T16)packed(x, x); }

// d += a b, of a 16 x 16 and a 16 x 8 tile
DEVICE void multiply(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

#define EMPTY 0xffffffffu
#define ALL_GROUPS (PARTS * TEAMS * GROUPS)
#define THREADS (WARPS * 32)
#define SHARED_K (BLOCKS_K - REGISTERS_K)
DEVICE bool is_empty(uint4 v) { return v.x == EMPTY || v.y == EMPTY || v.z == EMPTY || v.w == EMPTY; }
#ifdef CLUSTER
DEVICE bool is_empty(unsigned v) { return v == EMPTY; }
DEVICE void make_empty(uint4* place) { *place = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY); }
DEVICE void make_empty(unsigned* place) { *place = EMPTY; }
#endif

// `count` words, in turn by all threads of so many blocks.
DEVICE void copy_words(void* to, const void* from, int count, int blocks) {
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < count; i += blocks * THREADS) ((unsigned*)to)[i] = ((const unsigned*)from)[i];
}

// A number of a first or last state, in 16 bits or 32.
DEVICE float state_at(const void* p, int at, int is_short) { return is_short & 1 ? widened(((const T16*)p)[at]) : ((const float*)p)[at]; }

// Place `at` of the last step's h, by words of two, and c.
DEVICE void copy_last(T16* h_last, void* c_last, int is_short, const T16* y, const float* c, int T, int at) {
    const long long from = (long long)T * BATCH * H + at;
    if (!(at & 1)) *(unsigned*)(h_last + at) = *(const unsigned*)(y + from);
    if (is_short & 2) ((T16*)c_last)[at] = narrowed(c[from]);
    else ((float*)c_last)[at] = c[from];
}

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

// Vectors are exchanged in the order in which the products load them, [block of 32 k][tile of 8 batch rows][row][chunk of 8 k], or for
// wide products [chunk][row], so that a warp's 32 loads of 16 bytes are 4 whole lines of the L2 cache. A step's group of batch rows
// has VECTORS numbers.
#if WIDE
#define LANE(row, chunk) ((chunk) * 8 + (row))
#else
#define LANE(row, chunk) ((row) * 4 + (chunk))
#endif
#ifdef UNITS
#define VECTORS ((H + 31) / 32 * TILES_N * 256)
DEVICE int place_in_vectors(int row, int unit) {
    return ((unit / 32 * TILES_N + row / 8) * 32 + LANE(row % 8, unit % 32 / 8)) * 8 + unit % 8;
}
#else
#define VECTORS ((H + ROW_UNITS - 1) / ROW_UNITS * ROW_UNITS / 8 * TILES_N * 256)
#ifdef CLUSTER
// A block of 32 k: the gates of 8 units.
DEVICE int place_in_vectors(int row, int unit, int gate) {
    return ((unit / 8 * TILES_N + row / 8) * 32 + LANE(row % 8, gate)) * 8 + unit % 8;
}
#else
// Chunk k of a block's rows: 16 units of a gate, then the same of the next gate.
DEVICE int chunk_gate(int k) { return (k >> 1) & 3; }
DEVICE int chunk_unit(int k) { return (k >> 3) * 16 + (k & 1) * 8; }
DEVICE int place_in_vectors(int row, int unit, int gate) {
    const int of_block = unit % ROW_UNITS, chunk = of_block / 16 * 8 + gate * 2 + of_block % 16 / 8;
    return (((unit / ROW_UNITS * (ROW_UNITS / 8) + chunk / 4) * TILES_N + row / 8) * 32 + LANE(row % 8, chunk % 4)) * 8 + unit % 8;
}
#endif
#endif

// Where the vectors of number `step` of a group are.
DEVICE int slot(int step, int group) { return ((step & (SLOTS - 1)) * ALL_GROUPS + group) * VECTORS; }

// What is asked for too early costs a whole trip, and others' trips their time: so a warp waits for PACE cycles after a barrier
// before it asks for vectors. Where PACE is not given, the forward kernel with one group finds it.
#ifdef PACE
#define FINDS_PACE 0
#else
#define PACE 0
#if defined(UNITS) && GROUPS == 1
#define FINDS_PACE 1
#else
#define FINDS_PACE 0
#endif
#endif
struct Pace {
    unsigned start, found;
    DEVICE Pace() : found(0) { begin(); }
    DEVICE void begin() { start = cycles(); }
    DEVICE void hold(unsigned given) {
        const unsigned wait = FINDS_PACE ? found : given;
        if (wait) while (cycles() - start < wait);
    }
    DEVICE void judge(bool too_early) {
        if (FINDS_PACE) found = too_early ? min((int)found + 200, 5000) : found > 20 ? found - 20 : 0;
    }
};

#ifdef UNITS
// The sums of both biases of the gates of units from number `unit0` on to shared memory.
DEVICE void put_bias(float4* to, const T16* b_ih, const T16* b_hh, int unit0) {
    for (int i = threadIdx.x; i < UNITS && unit0 + i < H; i += THREADS) {
        float of[4];
#pragma unroll
        for (int gate = 0; gate < 4; gate++) of[gate] = widened(b_ih[gate * H + unit0 + i]) + widened(b_hh[gate * H + unit0 + i]);
        to[i] = make_float4(of[0], of[1], of[2], of[3]);
    }
}
#endif

DEVICE float tangent(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

#ifdef CLUSTER
// The sums that a cluster's blocks send each other, two in a word: forward in fp16, for they are of moderate size and of what was rounded to 16
// bits; backward in the layer's own type, as the gradients that are made of them.
#ifdef UNITS
DEVICE unsigned narrow_sums(float low, float high) { return halves(low, high); }
DEVICE float2 wide_sums(unsigned v) { return from_halves(v); }
#else
DEVICE unsigned narrow_sums(float low, float high) { return packed(low, high); }
DEVICE float2 wide_sums(unsigned v) { return unpacked(v); }
#endif
DEVICE void add_sums(float (&sums)[2], unsigned v) {
    const float2 x = wide_sums(v);
    sums[0] += x.x, sums[1] += x.y;
}
DEVICE void add_sums(float (&sums)[8], uint4 v) {
    const float2 x[4] = {wide_sums(v.x), wide_sums(v.y), wide_sums(v.z), wide_sums(v.w)};
#pragma unroll
    for (int j = 0; j < 4; j++) sums[2 * j] += x[j].x, sums[2 * j + 1] += x[j].y;
}
#endif

#ifdef ROW_UNITS
#define AT_ONCE 12  // loads on their way
// Launched after `backward`: d_bias (4H), the sums of the rows of d_gates (rows, 4H), 32 columns a block.
KERNEL bias_gradient(const T16* d_gates, T16* d_bias, int rows) {
    SHARED(shared);
    float* sums = (float*)shared;
    const int thread = threadIdx.x, column = thread % 32, first = thread % 4 * 8;
    float total[8] = {};
    for (int row0 = thread / 4; row0 < rows; row0 += AT_ONCE * THREADS / 4) {
        uint4 words[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int row = row0 + i * THREADS / 4;
            words[i] = load_words(d_gates + (long long)row * 4 * H + blockIdx.x * 32 + first, row < rows);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float2 two[4] = {unpacked(words[i].x), unpacked(words[i].y), unpacked(words[i].z), unpacked(words[i].w)};
#pragma unroll
            for (int e = 0; e < 4; e++) total[2 * e] += two[e].x, total[2 * e + 1] += two[e].y;
        }
    }
#pragma unroll
    for (int e = 0; e < 8; e++) sums[thread / 4 * 32 + first + e] = total[e];
    barrier();
    float part = 0.0f;  // of a warp's 8 rows
    for (int i = 0; i < 8; i++) part += sums[(thread / 32 * 8 + i) * 32 + column];
    barrier();
    sums[thread] = part;
    barrier();
    if (thread >= 32) return;
    float all = 0.0f;
    for (int i = 0; i < WARPS; i++) all += sums[i * 32 + thread];
    d_bias[blockIdx.x * 32 + thread] = narrowed(all);
}
#endif

// A partial sum on its way, its last bit the one that tells this use of a place from the next.
DEVICE unsigned marked(float x, unsigned bit) { return (__float_as_uint(x) & ~1u) | bit; }
