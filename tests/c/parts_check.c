/* Steps over parts of parameters, as several processes take them, leave the bytes of a step over all
 * of each; and means of what processes, or micro-batches, have are those that C's own arithmetic gives.
 * Takes driver_check's arguments. */
#include "driver.h"
#include <fenv.h>

enum { N_TENSORS = 3, PARTS = 3, MOST = 2 * FO_BLOCK + 100, ARRAYS = 2 + FO_MAX_SLOTS, STEPS = 3 };

/* Where the parts begin, and the last one ends: one is cut twice, one belongs to the last part alone,
 * and of one there is nothing. */
static const int64_t bounds[N_TENSORS][PARTS + 1] = {
    {0, FO_BLOCK, 2 * FO_BLOCK, MOST}, {0, 0, 0, 70}, {0, 0, 0, 0}};

static const struct {
    fo_clip clip;
    double limit, scale;
    bool averages;
} options[] = {{FO_NO_CLIP, 0, 1, true},
               {FO_CLIP_VALUE, 0.25, 1, false},
               {FO_CLIP_NORM, 1, 8, false},
               {FO_GLOBAL_CLIP_NORM, 1, 8, true}};

/* Array 0 is the parameter, 1 the average, the others are slots. */
typedef struct {
    double arrays[N_TENSORS][ARRAYS][MOST], grad[N_TENSORS][MOST], number[N_TENSORS];
    int64_t step[N_TENSORS];
} model;

static double *at(model *m, int tensor, int array, fo_dtype dtype, int64_t offset)
{
    return (double *)((char *)m->arrays[tensor][array] + (size_t)offset * fo_storages[dtype].bytes);
}

/* A plan over one part of each tensor, or (-1) over all of each. */
static fo_plan *plan_over(const fo_rule *rule, int row, fo_dtype dtype, bool averages, int part,
                          model *m)
{
    fo_plan *plan = checked(fo_plan_create(rule, 1, N_TENSORS));
    double *hypers = fo_plan_hypers(plan, 0);
    fill_hypers(rule, row, 0, hypers);
    for (int i = 0; i < N_TENSORS; i++) {
        const int64_t begin = part < 0 ? 0 : bounds[i][part];
        const int64_t end = part < 0 ? bounds[i][PARTS] : bounds[i][part + 1];
        fo_tensor *t = fo_plan_tensor(plan, i);
        *t = (fo_tensor){.param = at(m, i, 0, dtype, begin),
                         .ema = averages ? at(m, i, 1, dtype, begin) : NULL,
                         .step = &m->step[i],
                         .size = end - begin,
                         .width = 1,
                         .dtype = fo_one_dtype(dtype),
                         .grad = (char *)m->grad[i] + (size_t)begin * fo_storages[dtype].bytes};
        for (int j = 0; j < FO_MAX_SLOTS; j++)
            if (fo_rule_slot_number(rule, j))
                t->slot[j] = &m->number[i];
            else if (fo_rule_uses_slot(rule, hypers, j))
                t->slot[j] = at(m, i, 2 + j, dtype, begin);
    }
    if (fo_plan_prepare(plan) != FO_OK)
        checked(NULL);
    return plan;
}

static void fill(fo_dtype dtype, double *array, int64_t n)
{
    for (int64_t e = 0; e < n; e++) {
        const double value = random_value(dtype);
        const float narrow = (float)value;
        if (dtype == FO_F32)
            memcpy((float *)array + e, &narrow, sizeof narrow);
        else
            array[e] = value;
    }
}

/* The squares of whole gradients, from those of the parts' blocks, which follow one another. */
static void add_up(fo_plan *const *parts, const fo_step_args *args, double *squares, bool bad)
{
    static double sums[PARTS][16];
    static bool finite[PARTS][16];
    int64_t next[PARTS] = {0}, not_finite = 0;
    for (int k = 0; k < PARTS; k++)
        fo_plan_scan(parts[k], args, sums[k], finite[k]);
    for (int i = 0; i < N_TENSORS; i++) {
        squares[i] = 0;
        for (int k = 0; k < PARTS; k++)
            for (int64_t b = bounds[i][k]; b < bounds[i][k + 1]; b += FO_BLOCK) {
                not_finite += !finite[k][next[k]];
                squares[i] += sums[k][next[k]++];
            }
    }
    for (int k = 0; k < PARTS; k++)
        if (next[k] != fo_plan_blocks(parts[k]))
            not_finite = -1;
    expect(not_finite == bad, "blocks that are not finite", &fo_rules[0]);
}

static void check_steps(const fo_rule *rule, int row, int option, fo_dtype dtype)
{
    static model whole, cut[PARTS];
    fo_plan *plan = plan_over(rule, row, dtype, options[option].averages, -1, &whole);
    fo_plan *parts[PARTS];
    record r = {0};
    fo_step_args args = {.loss_scale = options[option].scale,
                         .clip = options[option].clip,
                         .clip_limit = options[option].limit,
                         .ema_decay = 0.75,
                         .accumulate = 1,
                         .max_threads = 2,
                         .exact = true};
    fo_step_result result, result_of_part;
    memset(&whole, 0, sizeof whole);
    for (int i = 0; i < N_TENSORS; i++) {
        fill(dtype, whole.arrays[i][0], bounds[i][PARTS]);
        whole.number[i] = 1;
    }
    for (int k = 0; k < PARTS; k++) {
        cut[k] = whole;
        parts[k] = plan_over(rule, row, dtype, options[option].averages, k, &cut[k]);
    }
    for (int s = 0; s < STEPS; s++) {
        double squares[N_TENSORS];
        for (int i = 0; i < N_TENSORS; i++) {
            fill(dtype, whole.grad[i], bounds[i][PARTS]);
            for (int k = 0; k < PARTS; k++)
                memcpy(cut[k].grad[i], whole.grad[i], sizeof whole.grad[i]);
        }
        args.ema_starts = s == 0;
        args.squares = NULL;
        fo_plan_tensor(plan, 1)->grad = s == 1 ? NULL : whole.grad[1];
        for (int k = 0; k < PARTS; k++)
            fo_plan_tensor(parts[k], 1)->grad = s == 1 ? NULL : cut[k].grad[1];
        fo_plan_step(plan, &args, &result);
        add_up(parts, &args, squares, false);
        args.squares = squares;
        for (int k = 0; k < PARTS; k++) {
            fo_plan_step(parts[k], &args, &result_of_part);
            const bool alike = result_of_part.has_norm == result.has_norm &&
                               (!result.has_norm || result_of_part.grad_norm == result.grad_norm);
            expect(alike, "the norm of parts", rule);
        }
    }
    for (int i = 0; i < N_TENSORS; i++)
        for (int k = 0; k < PARTS; k++)
            for (int a = 0; a < ARRAYS; a++) {
                const int64_t begin = bounds[i][k], end = bounds[i][k + 1];
                const size_t n = (size_t)(end - begin) * fo_storages[dtype].bytes;
                const void *const own = at(&cut[k], i, a, dtype, begin);
                expect(memcmp(own, at(&whole, i, a, dtype, begin), n) == 0, "parts", rule);
                append(&r, own, n);
                expect(cut[k].step[i] == whole.step[i], "counters of parts", rule);
            }
    add_to_digest(&r);
    free(r.bytes);
    fo_plan_destroy(plan);
    for (int k = 0; k < PARTS; k++)
        fo_plan_destroy(parts[k]);
}

/* A value that is not finite is found, in the block that it is in. */
static void check_finite(void)
{
    static model m[PARTS];
    fo_plan *parts[PARTS];
    const fo_step_args args = {.loss_scale = 1, .accumulate = 1, .max_threads = 1};
    double squares[N_TENSORS];
    memset(m, 0, sizeof m);
    for (int k = 0; k < PARTS; k++)
        parts[k] = plan_over(fo_find_rule("sgd"), 0, FO_F64, false, k, &m[k]);
    add_up(parts, &args, squares, false);
    m[1].grad[0][2 * FO_BLOCK - 1] = INFINITY;
    add_up(parts, &args, squares, true);
    for (int k = 0; k < PARTS; k++)
        fo_plan_destroy(parts[k]);
}

/* ---- means ----------------------------------------------------------------------------------- */

enum { VECTORS = 4, LENGTH = FO_BLOCK + 77 };

/* Vectors of several types, their mean as C adds it up, and as fo_ordered_mean does. */
static void check_means(fo_dtype type, const fo_dtype *stored, int count)
{
    static double values[VECTORS][LENGTH], to[LENGTH], expected[LENGTH];
    static float narrow[VECTORS][LENGTH];
    static uint16_t coded[VECTORS][LENGTH];
    const void *from[VECTORS];
    record r = {0};
    for (int k = 0; k < VECTORS; k++) {
        for (int e = 0; e < LENGTH; e++)
            narrow[k][e] = (float)(values[k][e] = random_value(FO_F32));
        if (stored[k] == FO_BF16 || stored[k] == FO_F16) {
            fo_encode(stored[k], LENGTH, coded[k], narrow[k], NULL);
            fo_decode(stored[k], LENGTH, narrow[k], coded[k], NULL);
        }
        for (int e = 0; e < LENGTH; e++)
            values[k][e] =
                stored[k] == FO_F64 ? values[k][e] * (1 + 0x1p-40) : (double)narrow[k][e];
        from[k] = stored[k] == FO_F64   ? (const void *)values[k]
                  : stored[k] == FO_F32 ? (const void *)narrow[k]
                                        : (const void *)coded[k];
    }
    for (int e = 0; e < LENGTH; e++) {
        float sum = (float)values[0][e];
        double wide = values[0][e];
        for (int k = 1; k < count; k++) {
            sum += (float)values[k][e];
            wide += values[k][e];
        }
        if (type == FO_F32)
            ((float *)expected)[e] = sum / (float)count;
        else
            expected[e] = wide / count;
    }
    fesetround(FE_UPWARD);
    fo_ordered_mean(type, LENGTH, to, count, from, stored);
    expect(fegetround() == FE_UPWARD, "the rounding mode stays", &fo_rules[0]);
    fesetround(FE_TONEAREST);
    const size_t bytes = LENGTH * fo_storages[type].bytes;
    expect(memcmp(to, expected, bytes) == 0, "the mean of several vectors", &fo_rules[0]);
    append(&r, to, bytes);
    add_to_digest(&r);
    free(r.bytes);

    const void *const sums[] = {NULL, type == FO_F32 ? (const void *)narrow[0] : values[0]};
    for (int way = 0; way < 3; way++) { /* a gradient, a sum, both */
        const bool summed = way != 0, given = way != 1;
        for (int e = 0; e < LENGTH; e++) {
            const float total = (summed ? narrow[0][e] : 0) + (given ? 0.125f * narrow[1][e] : 0);
            const double wide = (summed ? values[0][e] : 0) + (given ? 0.125 * values[1][e] : 0);
            if (type == FO_F32)
                ((float *)expected)[e] = total / 3;
            else
                expected[e] = wide / 3;
        }
        fo_batch_mean(type, LENGTH, to, sums[summed], given ? from[1] : NULL, stored[1], 0.125, 3);
        for (int e = 0; e < LENGTH; e++) /* 0 plus -0 is 0 here, but not where nothing is added */
            if (type == FO_F32 ? ((float *)to)[e] != ((float *)expected)[e]
                               : to[e] != expected[e]) {
                expect(false, "the mean of micro-batches", &fo_rules[0]);
                break;
            }
    }
}

int main(int argc, char **argv)
{
    static const fo_dtype narrow[] = {FO_F32, FO_F32, FO_BF16, FO_F16};
    static const fo_dtype wide[] = {FO_F64, FO_F32, FO_BF16, FO_F64};
    const int every = is_given(argc, argv, "few") ? FEW : 1;
    int cases = 0;
    fo_init();
    for (int isa = 0; isa < fo_isa_count(); isa++) {
        if (isa > 0 && (is_given(argc, argv, "digest") || !fo_isa_select(fo_isa_name(isa))))
            continue;
        fo_isa_select(fo_isa_name(isa));
        const uint64_t before = digest;
        random_state = 1;
        for (int c = 0; c < fo_rule_count * ROWS; c += every) {
            double hypers[FO_MAX_HYPERS];
            fill_hypers(&fo_rules[c / ROWS], c % ROWS, 0, hypers);
            if (keeps_rows(&fo_rules[c / ROWS], hypers)) /* a part may end within a row */
                continue;
            for (int option = 0; option < COUNT(options); option++) {
                check_steps(&fo_rules[c / ROWS], c % ROWS, option, cases % 2 ? FO_F64 : FO_F32);
                cases++;
            }
        }
        check_finite();
        for (int count = 1; count <= VECTORS; count++) {
            check_means(FO_F32, narrow, count);
            check_means(FO_F64, wide, count);
        }
        if (isa > 0) /* the digest is that of `base`, whatever else there is */
            digest = before;
    }
    printf("%d cases over parts, %d differences\n", cases, wrong);
    printf("digest %016" PRIx64 "\n", digest);
    return wrong != 0;
}
