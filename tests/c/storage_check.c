/* What driver_check does for elements of the types that rules compute in, for those that are stored
 * otherwise: every rule and row of hyperparameters, stored in each of the ways below, gives the same
 * bytes under each instruction set, with teams of each kind, from unaligned memory, for gradients
 * laid out otherwise (which the loops of fused.inc do not take), and for tensors that are cut into
 * pieces or into tensors of their own, as with `base` on one thread. Random bits are checked against
 * what they are defined as; apart from them the Python tests know what the numbers should be. Takes
 * driver_check's arguments.
 *
 * Every array ends where its memory block ends, so that a step too far is seen.
 *
 * Link with -Wl,--wrap=fo_active_table. */
#include "driver.h"

#include "kernels.h"
#include "random.h"

enum { STEPS = 3, PARTS = 3, ARRAYS = 1 + FO_MAX_SLOTS, ALL = 15, BITS8 = 255 };

/* With state of BITS8, each slot is of the one of the two types that suits it. */
static const struct {
    uint8_t param, grad, state;
    unsigned random; /* the arrays that are rounded at random, if their type is */
    bool fused;      /* there are loops of fused.inc for this */
} ways[] = {
    {FO_BF16, FO_BF16, FO_F32, 0, true},          {FO_BF16, FO_BF16, FO_F32, ALL, true},
    {FO_BF16, FO_BF16, FO_BF16, 0, true},         {FO_BF16, FO_BF16, FO_BF16, ALL, true},
    {FO_BF16, FO_BF16, FO_BF16, 1 | 4, false},    {FO_BF16_SPLIT, FO_BF16, FO_F32, 0, true},
    {FO_BF16_SPLIT, FO_F32, FO_BF16, ALL, false}, {FO_BF16_SPLIT, FO_BF16, BITS8, ALL, false},
    {FO_F16, FO_F16, FO_F16, 0, false},           {FO_F16, FO_F16, FO_F16, ALL, false},
    {FO_F16_MASTER, FO_F16, FO_F32, 0, false},    {FO_F16_MASTER, FO_F32, BITS8, ALL, false},
    {FO_F32, FO_BF16, FO_BF16, ALL, false},       {FO_F32, FO_F32, BITS8, 0, false},
    {FO_F32, FO_F32, BITS8, ALL, false},          {FO_F32, FO_F32, BITS8, 4, false},
    {FO_BF16, FO_BF16, BITS8, ALL, false},        {FO_BF16, FO_BF16, BITS8, 1, false},
};

#define UPPER (INT64_C(1) << 32) /* elements have a key for each so many */

/* Straddling chunks, stretches, blocks and keys. */
static const struct {
    int64_t size, first;
} sizes[] = {{0, 0},
             {1, 3},
             {2, UPPER - 1},
             {63, 0},
             {64, 0},
             {65, 64},
             {130, UPPER - 64},
             {200, 1},
             {FO_BLOCK + 67, 2 * UPPER - 128},
             {FO_BLOCK + 200, 5 * UPPER - FO_BLOCK}};
enum { TENSORS = COUNT(sizes), MOST = FO_BLOCK + 200 };

static const struct {
    fo_step_args args;
    bool bad; /* some gradients are not finite */
} options[] = {
    {{.loss_scale = 1, .ema_decay = 0.9}, true},
    {{.loss_scale = 1, .clip = FO_CLIP_VALUE, .clip_limit = 0.25}, false},
    {{.loss_scale = 8, .accumulate = 2, .zero_grad = true, .ema_decay = 0.5}, false},
};

typedef enum { DENSE, SHIFTED, BACKWARDS, LAYOUTS } layout;
typedef enum { WHOLE, PIECES, TENSORS_OF_THEIR_OWN, CUTS } cut;

/* An array, with what is beside it. */
typedef struct {
    fo_dtype dtype;
    char *data, *beside;
} stored;

/* ---- loops of fused.inc that count how often they are called, and do nothing --------------------- */

static bool counts;
static int calls;

static void count(int64_t n, const fo_stored *arrays, const fo_stored *grad, bool stochastic,
                  uint64_t key, uint32_t element, const double *consts, double gscale, double gmax)
{
    (void)n, (void)arrays, (void)grad, (void)stochastic, (void)key, (void)element, (void)consts;
    (void)gscale, (void)gmax;
    calls++;
}

const fo_table *__real_fo_active_table(void);
const fo_table *__wrap_fo_active_table(void);

const fo_table *__wrap_fo_active_table(void)
{
    static fo_table counting;
    if (!counts)
        return __real_fo_active_table();
    counting = *__real_fo_active_table();
    for (int rule = 0; rule < FO_RULE_COUNT; rule++)
        for (int k = 0; k < FO_FUSED_COUNT; k++)
            for (int variant = 0; variant < FO_MAX_VARIANTS; variant++)
                counting.fused[rule][k][variant] = count;
    return &counting;
}

/* ---- arrays -------------------------------------------------------------------------------------- */

/* The values that all runs begin with and, after them, each step's gradients. */
static float values[1 + STEPS][MOST];

/* Sizes of blocks that are far apart, so that scales are, too. */
static void fill_values(void)
{
    random_state = 88172645463325252u;
    for (int s = 0; s <= STEPS; s++)
        for (int e = 0; e < MOST; e++) {
            const int down = s == 0 ? 0 : e / FO_SCALED % 4 * 40;
            values[s][e] = (float)ldexp(random_value(FO_F32), -down);
        }
}

static size_t beside(fo_dtype dtype, int64_t n) /* bytes beside so many elements */
{
    const fo_storage *storage = &fo_storages[dtype];
    return storage->per ? (size_t)((n + storage->per - 1) / storage->per) * storage->beside : 0;
}

static stored new_array(fo_dtype dtype, int64_t n, size_t shift)
{
    const size_t bytes = (size_t)n * fo_storages[dtype].bytes + shift;
    const size_t more = beside(dtype, n) + shift;
    return (stored){dtype, (char *)checked(calloc(bytes + !bytes, 1)) + shift,
                    (char *)checked(calloc(more + !more, 1)) + shift};
}

static void free_array(const stored *a, size_t shift)
{
    free(a->data - shift);
    free(a->beside - shift);
}

static char *at(const stored *a, int64_t e)
{
    return a->data + e * (int64_t)fo_storages[a->dtype].bytes;
}

/* Writes the values of a step; from the last to the first, if they are to be backwards. */
static void write_values(const stored *a, int64_t n, int step, bool bad, bool backwards)
{
    static float all[MOST];
    static const float others[] = {NAN, INFINITY, -INFINITY};
    for (int64_t e = 0; e < n; e++) {
        const bool odd = bad && n == MOST && e % FO_SCALED == FO_SCALED - 1;
        all[backwards ? n - 1 - e : e] = odd ? others[e / FO_SCALED % 3] : values[step][e];
    }
    fo_encode(a->dtype, n, a->data, all, a->beside);
}

/* NaNs of floats have a sign and a payload that processors choose. */
static void append_floats(record *r, const char *from, int64_t n)
{
    for (int64_t e = 0; e < n; e++) {
        float x;
        memcpy(&x, from + e * (int64_t)sizeof x, sizeof x);
        const float one = x == x ? x : 0;
        append(r, &one, sizeof one);
        if (x != x)
            append(r, "NaN", 3);
    }
}

static void append_array(record *r, const stored *a, int64_t n)
{
    if (a->dtype == FO_F32)
        append_floats(r, a->data, n);
    else
        append(r, a->data, (size_t)n * fo_storages[a->dtype].bytes);
    if (a->dtype == FO_F16_MASTER)
        append_floats(r, a->beside, n);
    else
        append(r, a->beside, beside(a->dtype, n));
}

/* Where part j of n elements begins, as far as parts begin at multiples of `unit`. */
static int64_t part_begin(int64_t n, int j, int64_t unit)
{
    static const int64_t thirds[] = {0, 5, 11, 16}; /* sixteenths */
    return j == PARTS ? n : n * thirds[j] / 16 / unit * unit;
}

static fo_dtype type_of(const fo_rule *rule, int way, int array)
{
    if (array == 0)
        return ways[way].param;
    if (fo_rule_slot_exact(rule, array - 1))
        return FO_F32;
    if (ways[way].state != BITS8)
        return ways[way].state;
    return fo_rule_slot_unsigned(rule, array - 1) ? FO_8BIT_UNSIGNED : FO_8BIT_SIGNED;
}

/* ---- steps --------------------------------------------------------------------------------------- */

/* The steps of a rule over arrays that are stored in some way, from the same start, always with the
 * same values. */
static void run(const fo_rule *rule, int row, int way, int option, bool exact, int team, layout how,
                cut cuts, record *r)
{
    static fo_piece pieces[PARTS * TENSORS];
    static stored arrays[TENSORS][ARRAYS], grads[TENSORS], averages[TENSORS], sums[TENSORS];
    static int64_t counters[TENSORS][PARTS];
    static double numbers[TENSORS][PARTS];
    static ptrdiff_t shapes[TENSORS][PARTS], strides[TENSORS];
    const int64_t unit = ways[way].state == BITS8 ? FO_SCALED : 1; /* scales are not cut up */
    const int each = cuts == TENSORS_OF_THEIR_OWN ? PARTS : 1;
    const size_t shift = how == SHIFTED;
    fo_plan *plan = checked(fo_plan_create(rule, 1, TENSORS * each));
    fill_hypers(rule, row, 0, fo_plan_hypers(plan, 0));
    memset(counters, 0, sizeof counters);

    for (int i = 0; i < TENSORS; i++) {
        const int64_t n = sizes[i].size;
        for (int j = 0; j < ARRAYS; j++)
            arrays[i][j] = new_array(type_of(rule, way, j), n, shift);
        grads[i] = new_array(ways[way].grad, n, shift);
        averages[i] = new_array(ways[way].grad, n, shift);
        sums[i] = new_array(FO_F32, n, shift);
        strides[i] = -(ptrdiff_t)fo_storages[ways[way].grad].bytes;
        write_values(&arrays[i][0], n, 0, false, false);
        for (int k = 0; k < PARTS; k++) {
            const int64_t begin = part_begin(n, k, unit), end = part_begin(n, k + 1, unit);
            pieces[PARTS * i + k] = (fo_piece){i, begin, end - begin, begin};
        }
        for (int k = 0; k < each; k++) {
            const int64_t begin = each == 1 ? 0 : part_begin(n, k, unit),
                          end = each == 1 ? n : part_begin(n, k + 1, unit);
            fo_tensor *t = fo_plan_tensor(plan, i * each + k);
            fo_coding *coding = fo_plan_coding(plan, i * each + k);
            *t = (fo_tensor){.step = &counters[i][k], .size = end - begin, .width = 1};
            *coding = (fo_coding){.seed = 7, .index = i, .first = sizes[i].first + begin};
            for (int j = 0; j < ARRAYS; j++) {
                const stored *a = &arrays[i][j];
                if (j > 0 && !fo_rule_uses_slot(rule, fo_plan_hypers(plan, 0), j - 1))
                    continue;
                if (j > 0 && fo_rule_slot_number(rule, j - 1)) {
                    numbers[i][k] = 1;
                    t->slot[j - 1] = &numbers[i][k];
                    continue;
                }
                *(j == 0 ? &t->param : &t->slot[j - 1]) = at(a, begin);
                *(j == 0 ? &t->dtype.of.param : &t->dtype.of.slot[j - 1]) = (uint8_t)a->dtype;
                coding->beside[j] = a->beside + beside(a->dtype, begin);
                if (a->dtype != FO_F32 && a->dtype != FO_BF16_SPLIT && a->dtype != FO_F16_MASTER)
                    coding->stochastic |= ways[way].random & FO_SLOT(j);
            }
            if (options[option].args.ema_decay != 0)
                t->ema = at(&averages[i], begin);
            if (options[option].args.accumulate > 1)
                t->sum = at(&sums[i], begin);
            t->dtype.of.grad = t->dtype.of.ema = ways[way].grad;
            shapes[i][k] = (ptrdiff_t)(end - begin);
            t->grad = at(&grads[i], how == BACKWARDS ? n - 1 - begin : begin);
            if (n == 0)
                t->grad = grads[i].data;
            t->grad_ndim = how == BACKWARDS;
            t->grad_shape = &shapes[i][k];
            t->grad_strides = &strides[i];
        }
    }
    const bool prepared = cuts == PIECES ? !fo_plan_prepare_pieces(plan, pieces, COUNT(pieces))
                                         : !fo_plan_prepare(plan);
    if (!prepared)
        checked(NULL);

    for (int s = 0; s < STEPS; s++) {
        fo_step_args args = options[option].args;
        fo_step_result result;
        args.ema_starts = s == 0;
        args.add = args.accumulate > 1 && s % args.accumulate + 1 < args.accumulate;
        args.max_threads = team;
        args.exact = exact;
        for (int i = 0; i < TENSORS; i++)
            write_values(&grads[i], sizes[i].size, 1 + s, options[option].bad && s == 1,
                         how == BACKWARDS);
        fo_plan_step(plan, &args, &result);
        expect(exact ? result.threads == team : result.threads <= team, "threads", rule);
    }
    r->length = 0;
    for (int i = 0; i < TENSORS; i++) {
        const int64_t n = sizes[i].size;
        for (int j = 0; j < ARRAYS; j++) {
            append_array(r, &arrays[i][j], n);
            free_array(&arrays[i][j], shift);
        }
        append_array(r, &averages[i], n);
        append_array(r, &sums[i], n);
        append(r, &counters[i][0], sizeof counters[i][0]);
        append(r, &numbers[i][0], sizeof numbers[i][0]);
        free_array(&averages[i], shift);
        free_array(&sums[i], shift);
        free_array(&grads[i], shift);
    }
    fo_plan_destroy(plan);
}

/* Steps take the loops that are made for what is stored so. (Without state, no two ways to store it
 * differ.) */
static void check_choice(void)
{
    record ignored = {0};
    for (int c = 0; c < fo_rule_count * ROWS * COUNT(ways); c++) {
        const fo_rule *rule = &fo_rules[c % fo_rule_count];
        const int way = c / fo_rule_count % COUNT(ways), row = c / fo_rule_count / COUNT(ways);
        double hypers[FO_MAX_HYPERS];
        fill_hypers(rule, row, 0, hypers);
        if (!fo_rule_uses_slot(rule, hypers, 0))
            continue;
        counts = true;
        calls = 0;
        run(rule, row, way, 0, false, 1, DENSE, WHOLE, &ignored);
        counts = false;
        expect((calls > 0) == ways[way].fused, "loops that are made for a storage", rule);
    }
    free(ignored.bytes);
}

/* Each element has its half of its pair's hash, under the key of the upper half of its index. Arrays
 * have the hash rotated; the last one's would not be seen otherwise, as no rule stores it in fewer
 * bits. */
static void check_random_bits(void)
{
    static const int rotated[ARRAYS] = {0, 16, 8, 24};
    static const int64_t begins[] = {0, 1, 62, 63, 64, UPPER - 65, UPPER - 2, 3 * UPPER - 300};
    static const int64_t lengths[] = {1, 2, 63, FO_STRETCH};
    const uint64_t key = 0x0123456789abcdef;
    for (int b = 0; b < COUNT(begins); b++)
        for (int c = 0; c < COUNT(lengths); c++)
            for (unsigned which = 0; which <= ALL; which++) {
                uint16_t found[ARRAYS][FO_STRETCH] = {{0}};
                bool right = true;
                fo_active_table()->random(lengths[c], found, which, key, begins[b]);
                for (int number = 0; number < ARRAYS; number++)
                    for (int64_t k = 0; k < FO_STRETCH; k++) {
                        const int64_t e = begins[b] + k;
                        const uint32_t pair = (uint32_t)(e % UPPER / 2);
                        const uint64_t hash = fo_hash(fo_key(key, e / UPPER), pair);
                        const uint64_t bits = (hash << 32 | hash) >> (32 - rotated[number]);
                        const bool asked = which & FO_SLOT(number) && k < lengths[c];
                        right &=
                            found[number][k] == (asked ? (e % 2 ? bits >> 16 : bits) & 0xffff : 0);
                    }
                expect(right, "random bits", &fo_rules[0]);
            }
}

int main(int argc, char **argv)
{
    static const char *const layers[] = {"team", "openmp"};
    static const int teams[] = {1, 2, 3, 7};
    int n_layers = fo_layer_available(FO_OPENMP) ? 2 : 1, every = 1;
    const bool compares = !is_given(argc, argv, "digest");
    record standard = {0}, r = {0};
    unsigned cases = 0, compared = 0;
    if (is_given(argc, argv, "own"))
        n_layers = 1;
    if (is_given(argc, argv, "few"))
        every = 11; /* which has no factor in common with the rules, rows and ways */
    fo_init();
    fill_values();
    for (int c = 0; c < fo_rule_count * ROWS * COUNT(ways); c += every) {
        const fo_rule *rule = &fo_rules[c % fo_rule_count];
        const int way = c / fo_rule_count % COUNT(ways), row = c / fo_rule_count / COUNT(ways);
        const int option = (way + row) % COUNT(options);
        fo_isa_select("base");
        run(rule, row, way, option, false, 1, DENSE, WHOLE, &standard);
        add_to_digest(&standard);
        for (int k = 0; k < fo_isa_count() * CUTS && compares; k++) {
            const char *isa = fo_isa_name(k / CUTS);
            const unsigned mixed = cases++ * 2654435761u;
            if (!fo_isa_select(isa))
                continue;
            fo_layer_select(layers[(mixed >> 28 & 1) % (unsigned)n_layers]);
            compared++;
            run(rule, row, way, option, mixed >> 31, teams[mixed >> 29 & 3],
                (layout)((mixed >> 20) % LAYOUTS), (cut)(k % CUTS), &r);
            expect(same(&r, &standard), isa, rule);
        }
    }
    check_choice();
    for (int isa = 0; isa < fo_isa_count(); isa++)
        if (fo_isa_select(fo_isa_name(isa)))
            check_random_bits();
    free(standard.bytes);
    free(r.bytes);
    printf("%u cases in fewer bits, %d differences\n", compared, wrong);
    printf("digest %016" PRIx64 "\n", digest);
    return wrong != 0;
}
