/* Drives the C core through core.h alone, for sanitizers to watch, and checks its promise of
 * equal bits: every rule and variant, under both semantics and with every option of a step, gives
 * the same bytes under each instruction set, with teams of 1, 2, 3 and 7 threads of each kind, for
 * gradients laid out otherwise, from unaligned memory, under another rounding mode and for tensors
 * that are cut into pieces, as with `base` on one thread. What the numbers should be is not its
 * business: the Python tests know. Arguments: `own` leaves OpenMP out, whose runtime a thread
 * sanitizer does not understand; `few` is for slow machines, and leaves out most configurations;
 * `digest` leaves out all that is compared, for a machine whose digest is compared with another's.
 *
 * Every array ends where its memory block ends, so that a step too far is seen. */
#include "driver.h"

#include <fenv.h>

enum { STEPS = 4, BAD_STEP = 2, MAX_AXES = 3, CUTS = 3 };

/* Straddling lanes and blocks; each in float and in double, so a plan has twice as many tensors. */
static const int64_t sizes[] = {0,
                                1,
                                2,
                                3,
                                4,
                                5,
                                6,
                                7,
                                8,
                                9,
                                15,
                                16,
                                17,
                                31,
                                32,
                                33,
                                63,
                                64,
                                65,
                                96,
                                97,
                                FO_BLOCK - 1,
                                FO_BLOCK,
                                FO_BLOCK + 1,
                                2 * FO_BLOCK + 5};
enum { TENSORS = 2 * COUNT(sizes) };

/* How many loops each rule has. */
static const int variants[] = {
#define FO_RULE(rule, variants) variants,
#include "rules.def"
#undef FO_RULE
};

static const struct {
    fo_step_args args;
    double bad; /* put into one gradient, at one step */
} options[] = {
    {{.loss_scale = 1}, 0},
    {{.loss_scale = 1, .clip = FO_CLIP_VALUE, .clip_limit = 0.25}, 0},
    {{.loss_scale = 8, .clip = FO_CLIP_NORM, .clip_limit = 1}, 0},
    {{.loss_scale = 1, .clip = FO_GLOBAL_CLIP_NORM, .clip_limit = 1}, 0},
    {{.loss_scale = 1, .ema_decay = 0.9}, 0},
    {{.loss_scale = 1, .zero_grad = true}, 0},
    {{.loss_scale = 1, .nonfinite = FO_SKIP, .ema_decay = 0.9}, NAN},
    {{.loss_scale = 1, .nonfinite = FO_SKIP, .zero_grad = true}, -INFINITY},
    {{.loss_scale = 1, .nonfinite = FO_RAISE, .zero_grad = true}, INFINITY},
    {{.loss_scale = 1, .nonfinite = FO_SKIP, .clip = FO_CLIP_NORM, .clip_limit = 1}, 0},
    {{.loss_scale = 8, .accumulate = 2, .clip = FO_CLIP_NORM, .clip_limit = 1}, 0},
    {{.loss_scale = 1, .accumulate = 3, .nonfinite = FO_SKIP, .zero_grad = true, .ema_decay = 0.9},
     NAN},
};

/* How the gradients lie in memory. */
typedef enum { DENSE, SHIFTED, BACKWARDS, TRANSPOSED, WITH_GAPS, LAYOUTS } layout;

typedef struct {
    fo_dtype dtype;
    int64_t size;
    char *param, *slot[FO_MAX_SLOTS], *ema, *sum, *grad;
    int64_t step;
    ptrdiff_t shape[MAX_AXES], strides[MAX_AXES];
    int axes;
    int64_t turn; /* element whose gradient comes first in memory */
    char *grad_block;
    double number; /* of a rule that keeps one */
    unsigned swapped;
} tensor;

static size_t item(fo_dtype dtype) { return dtype == FO_F32 ? sizeof(float) : sizeof(double); }

static void store(fo_dtype dtype, char *at, double value)
{
    const float narrow = (float)value;
    if (dtype == FO_F32)
        memcpy(at, &narrow, sizeof narrow);
    else
        memcpy(at, &value, sizeof value);
}

/* A block that is freed with free(array - shift). */
static char *new_array(const tensor *t, size_t shift)
{
    const size_t bytes = (size_t)t->size * item(t->dtype) + shift;
    return (char *)checked(calloc(bytes + !bytes, 1)) + shift;
}

/* Where element i of the gradient lies. */
static char *grad_at(const tensor *t, int64_t i)
{
    char *at = t->grad;
    i = (i - t->turn + t->size) % t->size;
    for (int axis = t->axes - 1; axis >= 0; axis--) {
        at += i % t->shape[axis] * t->strides[axis];
        i /= t->shape[axis];
    }
    return at;
}

/* Chooses shape and strides of the gradient, and makes its block. */
static void lay_out(tensor *t, layout how)
{
    const ptrdiff_t bytes = (ptrdiff_t)item(t->dtype), n = (ptrdiff_t)t->size;
    ptrdiff_t outer = 1, middle = 1, block = n * bytes, first = 0;
    for (ptrdiff_t d = 7; d > 1; d--) { /* n = outer * middle * inner */
        if (outer == 1 && n % d == 0)
            outer = d;
        else if (middle == 1 && n / outer % d == 0)
            middle = d;
    }
    const ptrdiff_t inner = n / (outer * middle);
    t->axes = 1;
    t->shape[0] = n;
    t->strides[0] = bytes;
    if (how == SHIFTED) {
        first = 1;
        block += 1;
    } else if (how == BACKWARDS && n > 0) {
        t->strides[0] = -bytes;
        first = (n - 1) * bytes;
    } else if (how == TRANSPOSED || how == WITH_GAPS) {
        const ptrdiff_t gap = how == WITH_GAPS ? 3 * bytes : bytes;
        t->axes = 3;
        t->shape[0] = outer, t->shape[1] = middle, t->shape[2] = inner;
        t->strides[0] = gap, t->strides[1] = gap * outer, t->strides[2] = gap * outer * middle;
        if (n > 0)
            block = (n - 1) * gap + bytes;
    }
    t->grad_block = checked(calloc((size_t)block + !block, 1));
    t->grad = t->grad_block + first;
}

/* Cuts tensor i into three pieces, between multiples of `unit`, and has the gradient of one of them
 * come first in memory. */
static void cut_up(int i, tensor *t, int64_t unit, unsigned *seed, fo_piece *pieces)
{
    int64_t points[CUTS + 1] = {0};
    for (int j = 1; j < CUTS; j++) {
        const int64_t units = (t->size - points[j - 1]) / unit;
        *seed = *seed * 1664525 + 1013904223;
        points[j] = points[j - 1] + (*seed >> 8) % (units + 1) * unit;
    }
    points[CUTS] = t->size;
    t->turn = points[*seed >> 30];
    for (int j = 0; j < CUTS; j++) {
        const int64_t first = points[j], grad = first - t->turn;
        pieces[j] = (fo_piece){i, first, points[j + 1] - first, grad < 0 ? grad + t->size : grad};
    }
}

static void append_arrays(record *r, const tensor *tensors)
{
    for (int i = 0; i < TENSORS; i++) {
        const tensor *t = &tensors[i];
        const size_t bytes = (size_t)t->size * item(t->dtype);
        append(r, t->param, bytes);
        for (int j = 0; j < FO_MAX_SLOTS; j++)
            append(r, t->slot[j], bytes);
        append(r, t->ema, bytes);
        append(r, t->sum, bytes);
        append(r, &t->step, sizeof t->step);
        append(r, &t->number, sizeof t->number);
    }
}

static void append_grads(record *r, const tensor *tensors)
{
    for (int i = 0; i < TENSORS; i++)
        for (int64_t e = 0; e < tensors[i].size; e++)
            append(r, grad_at(&tensors[i], e), item(tensors[i].dtype));
}

/* Which arrays of float32 are stored with their bytes swapped, in a build that has that type. */
enum {
    SWAPPED = FO_F16_MASTER + 1,
    IN_PARAM = 1,
    IN_STATE = 2,
    IN_EMA = 4,
    IN_SUM = 8,
    IN_GRAD = 16
};

static void swap(char *at, int64_t elements)
{
    for (; elements > 0; elements--, at += sizeof(uint32_t)) {
        const char bytes[] = {at[3], at[2], at[1], at[0]};
        memcpy(at, bytes, sizeof bytes);
    }
}

static void swap_arrays(const tensor *t, unsigned which)
{
    if (which & IN_PARAM)
        swap(t->param, t->size);
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        if (which & IN_STATE)
            swap(t->slot[j], t->size);
    if (which & IN_EMA)
        swap(t->ema, t->size);
    if (which & IN_SUM)
        swap(t->sum, t->size);
}

static void swap_grad(const tensor *t, unsigned which)
{
    for (int64_t e = 0; e < t->size && (which & IN_GRAD); e++)
        swap(grad_at(t, e), 1);
}

static fo_dtypes dtypes(unsigned which)
{
    const uint8_t s = which & IN_STATE ? SWAPPED : FO_F32;
    return (fo_dtypes){.of = {.param = which & IN_PARAM ? SWAPPED : FO_F32,
                              .slot = {s, s, s},
                              .ema = which & IN_EMA ? SWAPPED : FO_F32,
                              .sum = which & IN_SUM ? SWAPPED : FO_F32,
                              .grad = which & IN_GRAD ? SWAPPED : FO_F32}};
}

/* Whether a rule has all its loops in some row. */
static bool has_all_variants(const fo_rule *rule)
{
    unsigned seen = 0;
    for (int row = 0; row < ROWS; row++) {
        double hypers[FO_MAX_HYPERS];
        fill_hypers(rule, row, 0, hypers);
        seen |= 1u << rule->variant(hypers);
    }
    return seen == (1u << variants[rule - fo_rules]) - 1;
}

/* The steps of one configuration and option from the same start, always with the same values.
 * `cuts` chooses where tensors are cut; 0: nowhere. */
static void run(const fo_rule *rule, int row, fo_semantics semantics, int option, bool exact,
                int team, layout how, unsigned swapped, int rounding, unsigned cuts, record *r)
{
    static fo_piece pieces[CUTS * TENSORS];
    const fo_clip clip = options[option].args.clip;
    /* A norm is a sum of blocks' sums: its bits stay where blocks stay. */
    const int64_t unit = clip == FO_CLIP_NORM || clip == FO_GLOBAL_CLIP_NORM ? FO_BLOCK : 1;
    static record before, after;
    fo_plan *plan = checked(fo_plan_create(rule, 2, TENSORS));
    const size_t shift = how == SHIFTED;
    static tensor tensors[TENSORS];
    random_state = 88172645463325252u;
    for (int g = 0; g < 2; g++)
        fill_hypers(rule, row, g, fo_plan_hypers(plan, g));
    if (keeps_rows(rule, fo_plan_hypers(plan, 0)))
        swapped &= ~(unsigned)IN_STATE; /* which is always stored as it is computed */

    for (int i = 0; i < TENSORS; i++) {
        tensor *t = &tensors[i];
        fo_tensor *bound = fo_plan_tensor(plan, i);
        *t = (tensor){.dtype = i % 2 ? FO_F64 : FO_F32,
                      .size = sizes[i / 2],
                      .number = 1.0 / (1 + i / 2 % 2)};
        t->param = new_array(t, shift);
        t->ema = new_array(t, shift);
        t->sum = new_array(t, shift);
        lay_out(t, how);
        if (cuts)
            cut_up(i, t, unit, &cuts, &pieces[CUTS * i]);
        for (int64_t e = 0; e < t->size; e++)
            store(t->dtype, t->param + (size_t)e * item(t->dtype), random_value(t->dtype));
        *bound = (fo_tensor){.param = t->param, .step = &t->step, .size = t->size, .width = 1};
        t->swapped = t->dtype == FO_F32 ? swapped : 0;
        bound->dtype = t->dtype == FO_F32 ? dtypes(swapped) : fo_one_dtype(t->dtype);
        swap_arrays(t, t->swapped & IN_PARAM); /* the others are zero */
        bound->group = i % 3 == 2;
        bound->ema = options[option].args.ema_decay != 0 ? t->ema : NULL;
        bound->sum = options[option].args.accumulate > 1 ? t->sum : NULL;
        for (int j = 0; j < FO_MAX_SLOTS; j++) {
            t->slot[j] = new_array(t, shift);
            if (fo_rule_slot_number(rule, j))
                bound->slot[j] = &t->number;
            else if (fo_rule_uses_slot(rule, fo_plan_hypers(plan, bound->group), j))
                bound->slot[j] = t->slot[j];
        }
    }
    if (fo_plan_prepare(plan) != FO_OK)
        checked(NULL);
    if (cuts && fo_plan_prepare_pieces(plan, pieces, COUNT(pieces)) != FO_OK)
        checked(NULL);

    r->length = 0;
    for (int s = 0; s < STEPS; s++) {
        fo_step_args args = options[option].args;
        const bool bad = options[option].bad != 0 && s == BAD_STEP;
        const int64_t bad_tensor = TENSORS - 3;
        fo_step_result result;
        args.semantics = semantics;
        args.ema_starts = s == 0;
        args.add = args.accumulate > 1 && s % args.accumulate + 1 < args.accumulate;
        args.max_threads = team;
        args.exact = exact;
        for (int i = 0; i < TENSORS; i++) {
            tensor *t = &tensors[i];
            fo_tensor *bound = fo_plan_tensor(plan, i);
            for (int64_t e = 0; e < t->size; e++)
                store(t->dtype, grad_at(t, e), random_value(t->dtype));
            bound->grad = s == 1 && i % 5 == 4 ? NULL : t->grad; /* now and then there is none */
            bound->grad_ndim = how == DENSE || how == SHIFTED ? 0 : t->axes;
            bound->grad_shape = t->shape;
            bound->grad_strides = t->strides;
            if (bad && i == bad_tensor)
                store(t->dtype, grad_at(t, t->size - 1), options[option].bad);
            if (args.nonfinite == FO_SKIP && !bad && t->dtype == FO_F64)
                for (int64_t e = 0; e < t->size && e < 2; e++)
                    store(t->dtype, grad_at(t, e), 1.3e154); /* the sum of squares overflows */
            swap_grad(t, t->swapped);
        }
        before.length = after.length = 0;
        if (bad)
            append_arrays(&before, tensors);
        fesetround(rounding);
        fo_plan_step(plan, &args, &result);
        expect(fegetround() == rounding, "rounding mode", rule);
        fesetround(FE_TONEAREST);
        if (bad)
            append_arrays(&after, tensors);
        expect(result.skipped == bad, "skipped", rule);
        expect(!bad || result.first_skipped == bad_tensor, "first_skipped", rule);
        expect(same(&before, &after), "a skipped step writes", rule);
        expect(exact ? result.threads == team : result.threads <= team, "threads", rule);
        if (result.has_norm)
            append(r, &result.grad_norm, sizeof result.grad_norm);
    }
    for (int i = 0; i < TENSORS; i++) {
        swap_arrays(&tensors[i], tensors[i].swapped);
        swap_grad(&tensors[i], tensors[i].swapped);
    }
    append_arrays(r, tensors);
    append_grads(r, tensors);
    for (int i = 0; i < TENSORS; i++) {
        free(tensors[i].param - shift);
        free(tensors[i].ema - shift);
        free(tensors[i].sum - shift);
        free(tensors[i].grad_block);
        for (int j = 0; j < FO_MAX_SLOTS; j++)
            free(tensors[i].slot[j] - shift);
    }
    fo_plan_destroy(plan);
}

/* ---- gradients of some rows ------------------------------------------------------------------ */

enum { ROW = 1500, MATRIX_ROWS = 7, RUNS = 5 };

/* Runs of rows: pieces of a tensor whose gradient holds three rows, and of a second tensor over the
 * same arrays, without a gradient, for the others. */
static const fo_piece runs[RUNS] = {{0, ROW, 2 * ROW, ROW},
                                    {0, 4 * ROW, ROW, 0},
                                    {1, 0, ROW, 0},
                                    {1, 3 * ROW, ROW, 0},
                                    {1, 5 * ROW, 2 * ROW, 0}};

typedef struct {
    float param[MATRIX_ROWS * ROW], slot[FO_MAX_SLOTS][MATRIX_ROWS * ROW], ema[MATRIX_ROWS * ROW],
        sum[MATRIX_ROWS * ROW], grad[3 * ROW];
} matrix;

/* Steps of a matrix: in these pieces, or each run a tensor of its own. Sums hold zeros at first. */
static void train(const fo_rule *rule, fo_step_args args, matrix *m, bool in_pieces)
{
    const int n = in_pieces ? 2 : RUNS;
    fo_plan *plan = checked(fo_plan_create(rule, 1, n));
    double *hypers = fo_plan_hypers(plan, 0);
    int64_t counters[RUNS] = {0};
    double numbers[RUNS] = {1, 1, 1, 1, 1};
    fo_step_result result;
    for (int j = 0; rule->hyper_names[j]; j++)
        hypers[j] = rule->defaults[j];
    for (int i = 0; i < n; i++) {
        const fo_piece all = {i, 0, MATRIX_ROWS * ROW, 0}, p = in_pieces ? all : runs[i];
        fo_tensor *t = fo_plan_tensor(plan, i);
        *t = (fo_tensor){.param = m->param + p.offset,
                         .ema = m->ema + p.offset,
                         .sum = args.accumulate > 1 ? m->sum + p.offset : NULL,
                         .has_sum = args.accumulate > 1,
                         .step = &counters[i],
                         .size = p.size,
                         .grad = p.tensor == 0 ? m->grad + p.grad : NULL};
        for (int j = 0; j < FO_MAX_SLOTS; j++)
            if (fo_rule_slot_number(rule, j))
                t->slot[j] = &numbers[i];
            else if (fo_rule_uses_slot(rule, hypers, j))
                t->slot[j] = m->slot[j] + p.offset;
    }
    if ((in_pieces ? fo_plan_prepare_pieces(plan, runs, RUNS) : fo_plan_prepare(plan)) != FO_OK)
        checked(NULL);
    expect(fo_plan_size(plan) == MATRIX_ROWS * ROW, "size", rule);
    for (int s = 0; s < 2; s++) {
        for (int e = 0; e < COUNT(m->grad); e++)
            m->grad[e] = (float)random_value(FO_F32);
        args.ema_starts = s == 0;
        args.add = s + 1 < args.accumulate;
        fo_plan_step(plan, &args, &result);
    }
    fo_plan_destroy(plan);
}

/* A tensor that has a gradient of some rows has the bits of several tensors. */
static void check_rows(void)
{
    static matrix start, separate, in_pieces;
    for (int rule = 0; rule < fo_rule_count; rule++)
        for (int accumulate = 1; accumulate <= 2; accumulate++)
            for (int zero_grad = 0; zero_grad < 2; zero_grad++) {
                const fo_step_args args = {.loss_scale = 8,
                                           .nonfinite = FO_RAISE,
                                           .ema_decay = 0.75,
                                           .accumulate = accumulate,
                                           .zero_grad = zero_grad,
                                           .max_threads = 3,
                                           .exact = true};
                for (int e = 0; e < MATRIX_ROWS * ROW; e++)
                    start.param[e] = (float)random_value(FO_F32);
                separate = in_pieces = start;
                const uint64_t state = random_state;
                train(&fo_rules[rule], args, &separate, false);
                random_state = state;
                train(&fo_rules[rule], args, &in_pieces, true);
                expect(memcmp(&separate, &in_pieces, sizeof separate) == 0, "rows",
                       &fo_rules[rule]);
            }
}

/* ---- all cases ------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    static const char *const layers[] = {"team", "team", "openmp", "openmp"};
    int ways = fo_layer_available(FO_OPENMP) ? COUNT(layers) : 2, every = 1;
    static const int teams[] = {1, 2, 3, 7};
    int n_teams = COUNT(teams);
    static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_TOWARDZERO};
    record standard[COUNT(options)] = {0}, r = {0};
    int cases = 0, compared = 0;
    if (is_given(argc, argv, "own"))
        ways = 2;
    if (is_given(argc, argv, "few"))
        every = FEW;
    if (is_given(argc, argv, "digest"))
        n_teams = 0;
    fo_init();
    for (int c = 0; c < fo_rule_count * ROWS; c += every) {
        const fo_rule *rule = &fo_rules[c / ROWS];
        const int row = c % ROWS;
        expect(has_all_variants(rule), "a variant is in no row", rule);
        for (fo_semantics semantics = FO_TORCH; semantics <= FO_KERAS; semantics++) {
            fo_isa_select("base");
            for (int i = 0; i < COUNT(options); i++) {
                run(rule, row, semantics, i, false, 1, DENSE, 0, FE_TONEAREST, 0, &standard[i]);
                add_to_digest(&standard[i]);
            }
            for (int team = 0; team < n_teams; team++)
                for (int isa = 0; isa < fo_isa_count(); isa++) {
                    if (!fo_isa_select(fo_isa_name(isa)))
                        continue;
                    for (int i = 0; i < COUNT(options); i++) {
                        const layout how = (layout)((cases + cases / LAYOUTS) % LAYOUTS);
                        const int rounding = modes[cases % COUNT(modes)];
                        const int way = cases++ / COUNT(modes) % ways;
                        fo_layer_select(layers[way]);
                        const unsigned swapped =
                            fo_storage_count > SWAPPED ? (unsigned)cases % 32 : 0;
                        const unsigned mixed = (unsigned)cases * 2654435761u;
                        if (mixed >> 30 & 1) /* half of all will do: others in each row */
                            continue;
                        compared++;
                        run(rule, row, semantics, i, way % 2, teams[team], how, swapped, rounding,
                            mixed >> 31 ? mixed : 0, &r);
                        expect(same(&r, &standard[i]), fo_isa_name(isa), rule);
                    }
                }
        }
    }
    check_rows();
    for (int i = 0; i < COUNT(options); i++)
        free(standard[i].bytes);
    free(r.bytes);
    printf("%d cases, %d differences\n", compared, wrong);
    printf("digest %016" PRIx64 "\n", digest);
    return wrong != 0;
}
