// What lstm.cu needs of a GPU, on a CPU: every thread of every block is a fibre, and all of them take turns on one thread
// in an order drawn anew in each round. A fibre gives way where a GPU's threads meet or wait for each other.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <ucontext.h>
#include <vector>

#define ON_CPU
#ifdef CLUSTER
#define IN_CLUSTER CLUSTER
#else
#define IN_CLUSTER 1
#endif
typedef unsigned short T16;
#define KERNEL static void
#define DEVICE inline
#define SHARED(name) uint4* name = (uint4*)fibre->block->shared.data()
#define threadIdx (fibre->thread)
#define blockIdx (fibre->block->index)

struct Index { int x; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static int min(int a, int b) { return a < b ? a : b; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float __uint_as_float(unsigned v) { float x; memcpy(&x, &v, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned v; memcpy(&v, &x, 4); return v; }

struct Meeting { int there = 0, round = 0; };
struct Warp { Meeting meeting; unsigned a[32][4], b[32][2], v[32]; };
struct Block {
    Index index;
    std::vector<uint4> shared;
    Meeting meeting, groups[16];
    std::vector<Warp> warps;
    int threads;
    Block* cluster;  // the first block of its cluster
    Meeting cluster_meeting;
    bool ended;
};
struct Fibre { Block* block; Index thread; ucontext_t context; std::vector<char> stack; bool done; };

static Fibre* fibre;
static ucontext_t scheduler;
static unsigned long long rounds;

static unsigned cycles() { static unsigned n; return n += 500; }
static void give_way() { swapcontext(&fibre->context, &scheduler); }

static void meet(Meeting& meeting, int all) {
    int round = meeting.round;
    if (++meeting.there == all) meeting.there = 0, meeting.round++;
    while (meeting.round == round) give_way();
}

static Warp& warp_here() { return fibre->block->warps[fibre->thread.x / 32]; }
static void barrier() { meet(fibre->block->meeting, fibre->block->threads); }
static void barrier(int group, int warps) { meet(fibre->block->groups[group], 32 * warps); }

static uint4 load_shared_words(const void* p) { give_way(); uint4 v; memcpy(&v, p, 16); return v; }
static uint2 load_shared_pair(const void* p) { give_way(); uint2 v; memcpy(&v, p, 8); return v; }
static void store_shared_word(void* p, unsigned v) { memcpy(p, &v, 4); give_way(); }
static void reload_shared_words(uint4& v, const void* p, bool wanted) { if (wanted) v = load_shared_words(p); }
static uint4 load_words(const void* p, bool wanted) { uint4 v = {0, 0, 0, 0}; if (wanted) memcpy(&v, p, 16); return v; }
static unsigned load_word(const void* p, bool wanted) { unsigned v = 0; if (wanted) memcpy(&v, p, 4); return v; }
static void store_shared_words(void* p, uint4 v) { memcpy(p, &v, 8); give_way(); memcpy((char*)p + 8, &v.z, 8); }
#ifdef CLUSTER
static void cluster_barrier() { meet(fibre->block->cluster->cluster_meeting, fibre->block->threads * CLUSTER); }
typedef char* Place;
static Place place_in(void* p, unsigned rank) {
    Block& here = *fibre->block;
    size_t offset = (char*)p - (char*)here.shared.data();
    if (rank >= CLUSTER || offset >= here.shared.size() * 16) abort();
    return (char*)here.cluster[rank].shared.data() + offset;
}
static void send_word(Place to, unsigned v) {
    Block* first = fibre->block->cluster;
    for (int i = 0; i < CLUSTER; i++) {
        char* begin = (char*)first[i].shared.data();
        if (to < begin || to + 4 > begin + first[i].shared.size() * 16) continue;
        if (first[i].ended) abort();
        memcpy(to, &v, 4);
        return give_way();
    }
    abort();
}
static void send(Place to, uint4 v) { send_word(to, v.x), send_word(to + 4, v.y), send_word(to + 8, v.z), send_word(to + 12, v.w); }
static uint4 load_arriving(const uint4* p) { give_way(); return *p; }
static unsigned load_arriving(const unsigned* p) { give_way(); return *p; }
template <class Word> static Word load_once(const Word* p) { return *p; }
template <class Word> static void store_once(Word* p, Word v) { *p = v; }
static void bring(void* to, const void* from, bool wanted) {
    if (wanted) memcpy(to, from, 8), give_way(), memcpy((char*)to + 8, (const char*)from + 8, 8);
}
static void bring_word(void* to, const void* from) { memcpy(to, from, 4); }
static void bring_pair(void* to, const void* from) { memcpy(to, from, 8); }
static void wait_for_brought() { give_way(); }
struct Token { uint16_t count, there; uint32_t passed; };
static void begin_token(Token* token, int count) { *token = {(uint16_t)count, 0, 0}; }
static void arrive(Token* token) {
    if (++token->there == token->count) token->there = 0, token->passed++;
    give_way();
}
static void wait_for(Token* token, unsigned odd) { while ((token->passed & 1) == odd) give_way(); }
static int anew(int v) { return v; }
static void in_order() {}
template <int> static void take_registers() {}
template <int> static void give_registers() {}
static void count_for_all(unsigned* number) { ++*number; }
static unsigned load_counted(const unsigned* number) { give_way(); return *number; }
static void warp_barrier() { meet(fibre->block->warps[fibre->thread.x / 32].meeting, 32); }
#endif
static unsigned long long nanoseconds() { return rounds + 1; }
static float sigmoid(float x) { return 1 / (1 + expf(-x)); }

static unsigned from_lane(unsigned v, int lane) {
    Warp& warp = warp_here();
    warp.v[fibre->thread.x % 32] = v;
    meet(warp.meeting, 32);
    unsigned there = warp.v[lane];
    meet(warp.meeting, 32);
    return there;
}
static float from_neighbour(float v) { return __uint_as_float(from_lane(__float_as_uint(v), fibre->thread.x % 32 ^ 1)); }
static bool any_lane(bool v) {
    bool any = false;
    from_lane(v, 0);  // all are here: what they left is of this call
    for (unsigned there : warp_here().v) any |= there;
    meet(warp_here().meeting, 32);
    return any;
}

static float widened(T16 v) {
#if HALF
    _Float16 x; uint16_t w = v; memcpy(&x, &w, 2); return (float)x;
#else
    return __uint_as_float((unsigned)v << 16);
#endif
}
static T16 narrowed(float x) {
    if (std::isnan(x)) return 0x7fff;
#if HALF
    _Float16 h = (_Float16)x; uint16_t w; memcpy(&w, &h, 2); return w;
#else
    unsigned v = __float_as_uint(x);
    return (v + 0x7fff + (v >> 16 & 1)) >> 16;
#endif
}
static unsigned halves(float low, float high) {
    _Float16 both[2] = {(_Float16)low, (_Float16)high};
    unsigned v;
    memcpy(&v, both, 4);
    return v;
}
static float2 from_halves(unsigned v) { _Float16 both[2]; memcpy(both, &v, 4); return {(float)both[0], (float)both[1]}; }
static unsigned packed(float low, float high) { return narrowed(low) | (unsigned)narrowed(high) << 16; }
static float2 unpacked(unsigned v) { return {widened((T16)v), widened((T16)(v >> 16))}; }

// As the PTX manual places the fragments of mma.m16n8k16.
static void multiply(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    Warp& warp = warp_here();
    int lane = fibre->thread.x % 32;
    unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    memcpy(warp.a[lane], a, 16), memcpy(warp.b[lane], b, 8);
    meet(warp.meeting, 32);
    for (int e = 0; e < 4; e++) {
        int row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            int from = k % 8 / 2, high = k / 8;
            float2 x = unpacked(warp.a[row % 8 * 4 + from][row / 8 + 2 * high]), y = unpacked(warp.b[column * 4 + from][high]);
            d[e] += k % 2 ? x.y * y.y : x.x * y.x;
        }
    }
    meet(warp.meeting, 32);
}

#ifdef CLUSTER
struct Matrix { const char* p; int k_bytes, row_bytes; };
static Matrix matrix_at(const void* p, int k_bytes, int row_bytes) { return {(const char*)p, k_bytes, row_bytes}; }
static Matrix further(Matrix m, int bytes) { return {m.p + bytes, m.k_bytes, m.row_bytes}; }
static float element(Matrix m, int row, int k) {
    T16 v;
    memcpy(&v, m.p + k / 8 * m.k_bytes + row / 8 * m.row_bytes + row % 8 * 16 + k % 8 * 2, 2);
    return widened(v);
}
// As the PTX manual places the fragments of wgmma.m64nNk16; each warp multiplies its own 16 rows.
static void multiply_wide(float (&d)[TILES_N][4], uint4 a, Matrix b) {
    Warp& warp = warp_here();
    int lane = fibre->thread.x % 32;
    memcpy(warp.a[lane], &a, 16);
    meet(warp.meeting, 32);
    for (int n = 0; n < TILES_N; n++)
        for (int e = 0; e < 4; e++)
            for (int k = 0; k < 16; k++) {
                float2 x = unpacked(warp.a[lane / 4 * 4 + k % 8 / 2][e / 2 + k / 8 * 2]);
                d[n][e] += (k % 2 ? x.y : x.x) * element(b, n * 8 + lane % 4 * 2 + e % 2, k);
            }
    meet(warp.meeting, 32);
}
static void multiply_wide(float (&d)[TILES_N][4], Matrix a, Matrix b) {
    int lane = fibre->thread.x % 32, row = fibre->thread.x / 32 % 4 * 16 + lane / 4;
    for (int n = 0; n < TILES_N; n++)
        for (int e = 0; e < 4; e++)
            for (int k = 0; k < 16; k++) d[n][e] += element(a, row + e / 2 * 8, k) * element(b, n * 8 + lane % 4 * 2 + e % 2, k);
}
static void written_for_wide() {}
template <class Sums> static void wide_begin(Sums&) {}
static void wide_end() {}
template <class Sums> static void wide_wait(Sums&) {}
#endif

static void (*body)();
static void enter() { body(); fibre->done = fibre->block->ended = true; give_way(); }

// Runs `body` in every thread of `blocks` blocks; false when nothing but waiting went on for too long. Warp number `lagging` of all
// blocks, if there is one, is much slower than the others at first.
static bool launch(void (*kernel)(), int blocks, int warps, int shared_bytes, unsigned seed, int lagging) {
    body = kernel;
    std::vector<Block> all(blocks);
    std::vector<std::unique_ptr<Fibre>> fibres;
    for (int b = 0; b < blocks; b++) {
        all[b].cluster = &all[b / IN_CLUSTER * IN_CLUSTER], all[b].ended = false;
        all[b].index = {b}, all[b].threads = warps * 32, all[b].warps.resize(warps), all[b].shared.resize(shared_bytes / 16);
        memset(all[b].shared.data(), 0xff, all[b].shared.size() * 16);
        for (int i = 0; i < warps * 32; i++) {
            auto made = std::make_unique<Fibre>();
            made->block = &all[b], made->thread = {i}, made->done = false, made->stack.resize(65536);
            getcontext(&made->context);
            made->context.uc_stack.ss_sp = made->stack.data(), made->context.uc_stack.ss_size = made->stack.size();
            makecontext(&made->context, enter, 0);
            fibres.push_back(std::move(made));
        }
    }
    std::mt19937 draw(seed);
    std::vector<Fibre*> order;
    for (auto& f : fibres) order.push_back(f.get());
    for (rounds = 0; rounds < 200000; rounds++) {
        size_t from = draw() % order.size();
        bool busy = false, back = draw() & 1;
        for (size_t i = 0; i < order.size(); i++) {
            size_t at = (from + i) % order.size();
            fibre = order[back ? order.size() - 1 - at : at];
            const bool lags = (fibre->block - all.data()) * warps + fibre->thread.x / 32 == lagging;
            if (fibre->done || (lags && rounds < 4000 ? rounds % 64 != 0 : draw() % 8 == 0)) { busy |= !fibre->done; continue; }
            busy = true;
            swapcontext(&scheduler, &fibre->context);
        }
        if (!busy) return true;
    }
    return false;
}
