/* Where driver_check does not go: allocations that fail, memory of arrays in fewer bits, limits and
 * norms that are not finite, averages in a step that is skipped, gradients that widen, momentum that
 * some have begun and others have not, names that do not exist, the pass that measures the bandwidth
 * bound, how the number of threads is found out, by a clock that is made up, the program's own pool,
 * and who does what in an OpenMP region.
 *
 * Link with -Wl,--wrap=calloc. */
#include "core.h"
#include "team.h"
#include "tuner.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static int wrong;

static void expect_at(bool holds, int line, const char *what)
{
    if (!holds) {
        wrong++;
        printf("edge_check.c:%d: not so: %s\n", line, what);
    }
}
#define EXPECT(holds) expect_at(holds, __LINE__, #holds)

/* ---- allocations ----------------------------------------------------------------------------- */

static int until_failure = -1;

void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);

void *__wrap_calloc(size_t n, size_t size)
{
    if (until_failure >= 0 && until_failure-- == 0)
        return NULL;
    return __real_calloc(n, size);
}

static void allocations(void)
{
    int failures = 0;
    for (int n = 0;; n++) { /* the first that fails is number n */
        float param = 0;
        int64_t step = 0;
        until_failure = n;
        fo_plan *plan = fo_plan_create(fo_find_rule("sgd"), 1, 1);
        if (!plan) {
            failures++;
            continue;
        }
        *fo_plan_tensor(plan, 0) = (fo_tensor){.param = &param, .step = &step, .size = 1};
        const fo_status status = fo_plan_prepare(plan);
        EXPECT(status == FO_OK || status == FO_NO_MEMORY);
        const bool done = until_failure >= 0;
        until_failure = -1;
        EXPECT((status == FO_OK) == done);
        EXPECT(fo_plan_prepare(plan) == FO_OK); /* once more, with memory */
        EXPECT(fo_plan_size(plan) == 1);
        const fo_piece pieces[] = {{0, 0, 0, 0}, {0, 0, 1, 0}, {0, 1, 0, 0}};
        until_failure = 0;
        EXPECT(fo_plan_prepare_pieces(plan, pieces, COUNT(pieces)) == FO_NO_MEMORY);
        until_failure = -1;
        EXPECT(fo_plan_prepare_pieces(plan, pieces, COUNT(pieces)) == FO_OK);
        EXPECT(fo_plan_size(plan) == 1);
        fo_plan_destroy(plan);
        if (done)
            break;
        failures++;
    }
    EXPECT(failures == 11);
    fo_plan_destroy(NULL);
}

/* Memory that fails for want of which rows are sorted, logged, or catch up: nothing is written, and
 * with memory all goes on. */
static void rows_that_lack_memory(void)
{
    enum { ROWS = 3, SIZE = 2 };
    static const int64_t few[] = {2}, more[] = {1, 0, 1};
    const fo_step_args args = {.loss_scale = 1, .accumulate = 1, .max_threads = 1};
    int failures = 0;
    for (int n = 0;; n++) { /* the first that fails is number n */
        float param[ROWS * SIZE] = {0}, buffer[ROWS * SIZE] = {0},
                           grad[3 * SIZE] = {1, 1, 1, 1, 1, 1};
        int64_t step = 0, which = 0, at = 0;
        int failed = 0;
        fo_row_log log = {0};
        fo_step_result result;
        fo_plan *plan = fo_plan_create(fo_find_rule("sgd"), 1, 1);
        fo_tensor *t = fo_plan_tensor(plan, 0);
        fo_plan_hypers(plan, 0)[0] = 1; /* lr */
        *t = (fo_tensor){.param = param,
                         .slot = {buffer},
                         .step = &step,
                         .size = ROWS * SIZE,
                         .log = &log,
                         .grad = grad,
                         .row_size = SIZE};
        for (int j = 0; fo_find_rule("sgd")->hyper_names[j]; j++)
            if (strcmp(fo_find_rule("sgd")->hyper_names[j], "momentum") == 0)
                fo_plan_hypers(plan, 0)[j] = 0.5;
        EXPECT(fo_plan_refresh(plan, 0, NULL, 0, &args, &at) == FO_OK); /* nothing is missed yet */
        until_failure = n;
        for (int s = 0; s < 3; s++) { /* of few rows, of more, which take more memory, of few */
            t->indices = s == 1 ? more : few;
            t->n_indices = s == 1 ? COUNT(more) : COUNT(few);
            while (!fo_row_log_prepare(&log, ROWS))
                failed++;
            for (fo_status status; (status = fo_plan_take_rows(plan, &which, &at)) != FO_OK;) {
                EXPECT(status == FO_NO_MEMORY);
                failed++;
            }
            fo_plan_step(plan, &args, &result);
        }
        const int64_t missing[] = {0, 0, ROWS}, rows[] = {0, 2, 0};
        EXPECT(param[0] == -1 && param[2] == -2); /* of the second step */
        EXPECT(fo_plan_refresh(plan, 0, missing, COUNT(missing), &args, &at) == FO_BAD_INDEX);
        EXPECT(at == 2 && param[0] == -1);
        for (fo_status status;
             (status = fo_plan_refresh(plan, 0, rows, COUNT(rows), &args, &at)) != FO_OK;) {
            EXPECT(status == FO_NO_MEMORY && param[0] == -1);
            failed++;
        }
        until_failure = -1;
        EXPECT(param[0] == -1.5F && param[2] == -2 && param[4] == -1 - 0.5F - 1.25F);
        EXPECT(fo_plan_refresh(plan, 0, NULL, 0, &args, &at) == FO_OK && param[2] == -3);
        EXPECT(fo_plan_refresh(plan, 0, NULL, 0, &args, &at) == FO_OK && param[2] == -3);
        fo_row_log_clear(&log);
        EXPECT(fo_plan_refresh(plan, 0, NULL, 0, &args, &at) == FO_OK && param[2] == -3);
        t->size = 0;
        EXPECT(fo_plan_refresh(plan, 0, NULL, 0, &args, &at) == FO_OK);
        fo_row_log_free(&log);
        fo_row_log_clear(&log); /* of one that was never needed */
        fo_plan_destroy(plan);
        EXPECT(failed <= 1);
        if (failed == 0)
            break;
        failures += failed;
    }
    EXPECT(failures == 19);
}

/* Arrays in fewer bits through the C interface: an optimizer whose first step fails for want of memory
 * goes on; what it was told of is gone with it, and other memory takes its place. */
static void stored_arrays(void)
{
    enum { N = 2 * FO_SCALED + 3 }; /* in memory of just that size, where sanitizers see its end */
    const fo_api *fo = fo_get_api();
    for (int failing = 0; failing < 2; failing++) {
        int64_t taken = 0;
        fo_optimizer *opt = NULL;
        EXPECT(fo->create("adam", 1, 1, &opt) == FO_OK);
        for (int kind = 0; kind < 4; kind++) {
            const bool f16 = kind % 2 == 1, master = kind < 2;
            uint16_t *param = calloc(N, sizeof *param), *grad = calloc(N, sizeof *grad);
            void *beside = calloc(N, f16 ? sizeof(float) : sizeof *param);
            uint8_t *codes = calloc(2, N), *scales = calloc(2, 3);
            EXPECT(param && grad && beside && codes && scales);
            fo_array p = fo_dense(f16 ? FO_F16 : FO_BF16, param), g = fo_dense(p.dtype, grad);
            fo_array m = fo_dense(FO_8BIT_SIGNED, codes), v = fo_dense(FO_8BIT_UNSIGNED, codes + N);
            for (int i = 0; i < N; i++)
                grad[i] = f16 ? 0x3c00 : 0x3f80; /* 1 */
            p.master = master ? beside : NULL;
            p.rounding = master ? FO_NEAREST : FO_STOCHASTIC;
            m.scales = scales;
            v.scales = scales + 3;
            taken = 0;
            EXPECT(fo->set_param(opt, 0, 0, N, &p, &taken) == FO_OK);
            EXPECT(fo->set_grad(opt, 0, &g) == FO_OK && fo->step(opt, NULL) == FO_INCOMPLETE);
            EXPECT(fo->set_state(opt, 0, "exp_avg", &m) == FO_OK);
            EXPECT(fo->set_state(opt, 0, "exp_avg_sq", &v) == FO_OK);
            if (failing && kind == 0) {
                until_failure = 0;
                EXPECT(fo->step(opt, NULL) == FO_NO_MEMORY && taken == 0 && param[0] == 0);
                until_failure = -1;
            }
            EXPECT(fo->step(opt, NULL) == FO_OK && taken == 1);
            EXPECT(codes[N - 1] != 0 && codes[2 * N - 1] != 0 && scales[2] != 0 && scales[5] != 0);
            EXPECT(param[N - 1] >> 15 == 1); /* negative: a step against the gradient */
            v.scales = NULL;                 /* refused, and what was there stays */
            EXPECT(fo->set_state(opt, 0, "exp_avg_sq", &v) == FO_BAD_POINTER);
            EXPECT(fo->step(opt, NULL) == FO_OK && taken == 2);
            free(param);
            free(grad);
            free(beside);
            free(codes);
            free(scales);
        }
        fo->destroy(opt);
    }
}

/* ---- steps ----------------------------------------------------------------------------------- */

enum { TENSORS = 3, SIZE = FO_BLOCK + 2 };

static float params[TENSORS][SIZE], grads[TENSORS][SIZE], averages[TENSORS][SIZE];

/* A step of SGD with rate 1 and decoupled decay 0 from zero, with these options, in which all
 * gradients are 3 but for some of `value`. */
static fo_step_result step(fo_step_args args, float value)
{
    int64_t steps[TENSORS] = {0};
    fo_step_result result;
    fo_plan *plan = fo_plan_create(fo_find_rule("sgd"), 1, TENSORS);
    double *hypers = fo_plan_hypers(plan, 0);
    for (int j = 0; fo_find_rule("sgd")->hyper_names[j]; j++)
        hypers[j] = strcmp(fo_find_rule("sgd")->hyper_names[j], "lr") == 0 ||
                    strcmp(fo_find_rule("sgd")->hyper_names[j], "decoupled_weight_decay") == 0;
    memset(params, 0, sizeof params);
    for (int i = 0; i < TENSORS; i++) {
        for (int e = 0; e < SIZE; e++) {
            grads[i][e] = 3;
            averages[i][e] = 7;
        }
        *fo_plan_tensor(plan, i) = (fo_tensor){.param = params[i],
                                               .ema = averages[i],
                                               .step = &steps[i],
                                               .size = SIZE,
                                               .dtype = fo_one_dtype(FO_F32),
                                               .grad = i == 0 ? NULL : grads[i]};
    }
    grads[1][0] = grads[1][SIZE - 1] = grads[2][SIZE - 1] = value;
    EXPECT(fo_plan_prepare(plan) == FO_OK);
    args.loss_scale = 1;
    args.max_threads = 1;
    fo_plan_step(plan, &args, &result);
    for (int i = 0; i < TENSORS; i++)
        EXPECT(steps[i] == (i > 0 && !result.skipped));
    fo_plan_destroy(plan);
    return result;
}

/* Gradients of a float64 parameter, in types of fewer bytes. */
static void gradients_that_widen(void)
{
    float values[] = {0.5f, -2, 0, 1.25f};
    uint16_t in_bf16[COUNT(values)];
    fo_encode(FO_BF16, COUNT(values), in_bf16, values, NULL);
    for (int k = 0; k < 2; k++) {
        double param[COUNT(values)] = {0};
        int64_t taken = 0;
        fo_plan *plan = fo_plan_create(fo_find_rule("sgd"), 1, 1);
        fo_plan_hypers(plan, 0)[0] = 1; /* the learning rate */
        fo_tensor *t = fo_plan_tensor(plan, 0);
        *t = (fo_tensor){.param = param, .step = &taken, .size = COUNT(values)};
        t->dtype = fo_one_dtype(FO_F64);
        t->dtype.of.grad = k == 0 ? FO_F32 : FO_BF16;
        t->grad = k == 0 ? (void *)values : (void *)in_bf16;
        EXPECT(fo_plan_prepare(plan) == FO_OK);
        const fo_step_args args = {.loss_scale = 1, .accumulate = 1, .max_threads = 1};
        fo_step_result result;
        fo_plan_step(plan, &args, &result);
        for (int i = 0; i < COUNT(values); i++)
            EXPECT(param[i] == -(double)values[i]);
        fo_plan_destroy(plan);
    }
}

static void steps(void)
{
    const fo_clip clips[] = {FO_CLIP_NORM, FO_GLOBAL_CLIP_NORM};
    for (int clip = 0; clip < 2; clip++)
        for (fo_semantics semantics = FO_TORCH; semantics <= FO_KERAS; semantics++) {
            fo_step_args args = {.clip = clips[clip], .semantics = semantics};
            args.clip_limit = INFINITY;
            EXPECT(step(args, 3).grad_norm == 3 * sqrt(2 * SIZE));
            EXPECT(params[1][0] == -3 && params[2][SIZE - 1] == -3); /* no limit */
            EXPECT(isnan(step(args, NAN).grad_norm) && isnan(params[1][1]) && isnan(params[2][1]));
            args.clip_limit = 1;
            EXPECT(isnan(step(args, NAN).grad_norm) && isnan(params[1][1]) && isnan(params[2][1]));
            args.clip_limit = 1e9;
            EXPECT(step(args, 3).has_norm && params[1][0] == -3);
            args.clip_limit = 3;
            EXPECT(step(args, 3).has_norm && params[1][0] > -1);
        }
    /* Skipped, because of the first bad tensor: with averages, which stay. */
    for (int zero = 0; zero < 2; zero++) {
        const fo_step_args args = {.nonfinite = FO_SKIP, .zero_grad = zero, .ema_decay = 0.5};
        const fo_step_result result = step(args, -INFINITY);
        EXPECT(result.skipped && result.first_skipped == 1 && !result.has_norm);
        EXPECT(params[1][1] == 0 && averages[0][0] == 7 && averages[1][1] == 7);
        EXPECT(grads[1][0] == (zero ? 0 : -INFINITY) && grads[2][1] == (zero ? 0 : 3));
    }
    /* Not looked for, but seen on the way to the norm. */
    const fo_step_args args = {.clip = FO_CLIP_NORM, .clip_limit = 1, .ema_starts = true};
    EXPECT(!step(args, INFINITY).skipped && isnan(params[1][0]) && params[0][0] == 0);
    EXPECT(isnan(averages[1][0]) && averages[0][0] == 0);
}

/* At the second step, of one group: a buffer that no step has written begins as the gradient; one
 * that holds something is damped. */
static void buffers_that_begin(void)
{
    const fo_rule *sgd = fo_find_rule("sgd");
    double param[2] = {0}, buffer[2] = {0.25, 0.25}, grad[2] = {1, 1};
    int64_t taken[2] = {1, 1};
    fo_plan *plan = fo_plan_create(sgd, 1, 2);
    for (int j = 0; sgd->hyper_names[j]; j++)
        fo_plan_hypers(plan, 0)[j] = strcmp(sgd->hyper_names[j], "lr") == 0          ? 1
                                     : strcmp(sgd->hyper_names[j], "momentum") == 0  ? 0.5
                                     : strcmp(sgd->hyper_names[j], "dampening") == 0 ? 0.75
                                                                                     : 0;
    for (int i = 0; i < 2; i++)
        *fo_plan_tensor(plan, i) = (fo_tensor){.param = &param[i],
                                               .slot = {&buffer[i]},
                                               .step = &taken[i],
                                               .size = 1,
                                               .dtype = fo_one_dtype(FO_F64),
                                               .grad = &grad[i],
                                               .fresh = i == 0 ? FO_SLOT(0) : 0};
    EXPECT(fo_plan_prepare(plan) == FO_OK);
    fo_step_result result;
    fo_plan_step(plan, &(fo_step_args){.loss_scale = 1, .max_threads = 1}, &result);
    EXPECT(buffer[0] == 1 && param[0] == -1);
    EXPECT(buffer[1] == 0.5 * 0.25 + 0.25 && param[1] == -buffer[1]);
    EXPECT(fo_plan_tensor(plan, 0)->fresh == 0 && fo_plan_tensor(plan, 1)->fresh == 0);
    fo_plan_destroy(plan);
}

/* ---- names ----------------------------------------------------------------------------------- */

static void names(void)
{
    double consts[FO_MAX_CONSTS], hypers[FO_MAX_HYPERS] = {0.5, 0.25, 1};
    const int active = fo_isa_active();
    EXPECT(fo_find_rule("no such rule") == NULL);
    EXPECT(fo_rule_name(0) == fo_rules[0].name && fo_rule_name(fo_rule_count - 1));
    EXPECT(!fo_rule_name(-1) && !fo_rule_name(fo_rule_count));
    EXPECT(!strcmp(fo_hyper_name("adam", 0), "lr") && !fo_hyper_name("adam", FO_MAX_HYPERS));
    EXPECT(!strcmp(fo_state_name("adam", 1), "exp_avg_sq") && !fo_state_name("adam", -1));
    EXPECT(!fo_hyper_name(NULL, 0) && !fo_hyper_name("no such rule", 0));
    EXPECT(!fo_state_name(NULL, 0) && !fo_state_name("no such rule", 0));
    EXPECT(fo_place_of(fo_find_rule("adam")->slot_names, "exp_avg_sq") == 1);
    EXPECT(fo_place_of(fo_find_rule("adam")->slot_names, "no such state") == -1);
    EXPECT(!fo_isa_select("no such instruction set") && fo_isa_active() == active);
    for (int i = 0; i < fo_isa_count(); i++) {
        const bool selected = fo_isa_select(fo_isa_name(i));
        EXPECT(selected == fo_isa_supported(i));
        EXPECT((fo_isa_active() == i) == selected);
        if (!selected)
            EXPECT(fo_isa_select("base"));
    }
    EXPECT(strlen(fo_compiler()) > 4);
    fo_rule_consts(&fo_rules[0], hypers, FO_TORCH, 1, 0, 0, consts);
    EXPECT(consts[1] == 1 - 0.5 * 0.25);
    hypers[1] = 0;
    fo_rule_consts(&fo_rules[0], hypers, FO_TORCH, 1, 0, 0, consts);
    EXPECT(consts[1] == 1);
}

/* ---- the bandwidth bound --------------------------------------------------------------------- */

static void bandwidth(void)
{
    static const uint32_t taken[] = {0, UINT32_MAX, 0x80F0000E};
    for (int n = 1; n <= 1 + FO_MAX_SLOTS; n++)
        for (int k = 0; k < 6; k++) {
            uint32_t updated[2][1 + FO_MAX_SLOTS][99], read[2][99];
            fo_bandwidth_tensor tensors[3] = {{.n_updated = n, .words = 99},
                                              {.n_updated = n, .words = 0},
                                              {.n_updated = n, .words = 50}};
            for (int t = 0; t < 2; t++) {
                tensors[2 * t].read = read[t];
                for (int i = 0; i < 99; i++) {
                    read[t][i] = (uint32_t)(1000 + i);
                    for (int j = 0; j < n; j++)
                        updated[t][j][i] = (uint32_t)(i + j);
                }
                for (int j = 0; j < n; j++)
                    tensors[2 * t].updated[j] = updated[t][j];
            }
            fo_bandwidth_run(tensors, 3, taken[k / 2], k % 2 ? 3 : 1);
            for (int t = 0; t < 2; t++)
                for (uint32_t i = 0; i < 99; i++)
                    for (int j = 0; j < n; j++)
                        EXPECT(
                            updated[t][j][i] ==
                            ((i + (uint32_t)j) ^ (t && i >= 50 ? 0 : (1000 + i) & taken[k / 2])));
        }
}

/* ---- the number of threads ------------------------------------------------------------------- */

enum { ELEMENTS = 1000000 };

/* Some steps, of which one with n threads takes seconds[n], and one with the pool seconds[0], or 0 if
 * there is none; returns how many steps used n threads in used[n]. All threads come, but every eighth
 * step, if `late`. */
static void simulate(fo_tuner *t, int most, int steps, const double *seconds, bool late, int *used)
{
    memset(used, 0, (FO_BLOCK) * sizeof *used);
    for (int i = 0; i < steps; i++) {
        const int choice = fo_tuner_choose(t, fo_tuner_last(most), seconds[0] > 0);
        const int threads = fo_tuner_threads(choice, most);
        const int n = choice == TUNER_POOL ? 0 : threads;
        EXPECT(1 <= threads && threads <= most && (n > 0 || threads == most));
        used[n]++;
        fo_tuner_learn(t, choice, late && i % 8 == 0 ? 1 : threads, seconds[n], ELEMENTS);
    }
}

static void tuner(void)
{
    static double seconds[FO_BLOCK];
    static int used[FO_BLOCK];
    for (int most = 2; most <= 512; most = 2 * most + (most == 8)) {
        for (int fastest = 1; fastest <= most && fastest <= 256; fastest *= 2) {
            fo_tuner t = {0};
            for (int n = 1; n <= most; n++)
                seconds[n] = 1e-4 * (1 + fabs(log2(n) - log2(fastest)));
            simulate(&t, most, 500, seconds, false, used);
            simulate(&t, most, 2000, seconds, true, used);
            EXPECT(used[fastest] > 2000 * 9 / 10); /* the rest are trials of its neighbours */
            int tried = 0;
            for (int n = 1; n <= most; n++)
                tried += used[n] > 0;
            EXPECT(tried <= 3);
            /* Another is the fastest now, be it at the other end. */
            const int then = fastest == 1 ? 2 : 1;
            for (int n = 1; n <= most; n++)
                seconds[n] = 1e-4 * (1 + fabs(log2(n) - log2(then)));
            simulate(&t, most, 60000, seconds, false, used);
            simulate(&t, most, 2000, seconds, false, used);
            EXPECT(used[then] > 2000 * 9 / 10);
        }
    }
    /* The pool is found to be the fastest again, however slow the team has become, and left again for
     * any number. */
    static const double phases[][3] = {{6, 10, 13}, {20, 10, 13}, {6, 10, 13},
                                       {6, 2, 9},   {6, 9, 2},    {6, 10, 13},
                                       {0, 10, 13}, {0, 13, 10},  {9, 13, 10}};
    fo_tuner pooled = {0};
    for (int phase = 0; phase < COUNT(phases); phase++) {
        const double *s = phases[phase];
        const int fastest = s[0] > 0 && s[0] < s[1] && s[0] < s[2] ? 0 : s[1] < s[2] ? 1 : 2;
        const double now[] = {1e-3 * s[0], 1e-3 * s[1], 1e-3 * s[2]};
        simulate(&pooled, 2, 20000, now, false, used);
        simulate(&pooled, 2, 2000, now, false, used);
        EXPECT(used[fastest] > 2000 * 9 / 10);
        EXPECT(used[0] == 0 || s[0] > 0);
    }
    /* Trials of what is slower cost little of the time, whatever it costs. */
    for (double slower = 1.05; slower < 9; slower *= 1.5) {
        const double now[] = {0, slower * 4e-3, 4e-3};
        fo_tuner long_steps = {0};
        simulate(&long_steps, 2, 200, now, false, used);
        simulate(&long_steps, 2, 20000, now, false, used);
        EXPECT(used[1] > 0 && used[1] * (slower - 1) < 0.015 * 20000);
    }
    pooled.trial = TUNER_POOL; /* which is under way, but the pool is gone */
    pooled.steps = 0;
    EXPECT(fo_tuner_choose(&pooled, 1, true) == TUNER_POOL);
    EXPECT(fo_tuner_choose(&pooled, 1, false) != TUNER_POOL);
    fo_tuner t = {0};
    simulate(&t, 2, 100, (double[]){0, 1e-3, 2e-3}, false, used); /* 1 is the faster */
    const fo_tuner before = t;
    fo_tuner_learn(&t, 0, 1, 0, ELEMENTS);
    fo_tuner_learn(&t, 0, 1, -1, ELEMENTS);
    EXPECT(memcmp(&t, &before, sizeof t) == 0); /* a clock that was set back */
    fo_tuner_learn(&t, 0, 1, 3600, ELEMENTS);
    EXPECT(t.cost[0] < 1.1 * before.cost[0]); /* one step that had to wait for an hour */
    fo_tuner_learn(&t, 0, 1, 1e-12, ELEMENTS);
    EXPECT(t.cost[0] > 0.9 * before.cost[0]);
    fo_tuner trial = {.warm = true}; /* the best of a few tries counts; */
    fo_tuner_learn(&trial, 0, 1, 3e-3, ELEMENTS);
    fo_tuner_learn(&trial, 0, 1, 1e-3, ELEMENTS);
    fo_tuner_learn(&trial, 0, 1, 2e-3, ELEMENTS);
    EXPECT(trial.cost[0] == 1e-3 / ELEMENTS && trial.tries[0] == 3);
    /* threads that may still be on their way do not, */
    fo_tuner_learn(&trial, 1, 1, 1e-4, ELEMENTS);
    EXPECT(trial.tries[1] == 0);
    fo_tuner_learn(&trial, 1, 1, 1e-3, ELEMENTS); /* but those that never come do */
    EXPECT(trial.tries[1] == 1);
    fo_tuner slow = {0}, quick = {0};
    simulate(&slow, 2, 10, (double[]){0, 1, 1}, false, used);
    EXPECT(slow.steps_a_trial == 4);
    simulate(&quick, 2, 200, (double[]){0, 1e-7, 1e-7}, false, used);
    EXPECT(quick.steps_a_trial == TUNER_MAX_TRIES);
}

/* ---- a pool of the program's ------------------------------------------------------------------ */

static int calls_of_pool;

static void run_alone(void (*act)(void *), void *context, unsigned threads, unsigned flags)
{
    EXPECT(threads == 2 && flags == 0);
    calls_of_pool++;
    act(context);
}

static int rank_alone(void) { return 0; }

/* How many of so many steps of so many elements it does. */
static int pooled(int64_t size, int threads, const fo_pool *pool, int steps)
{
    int64_t count = 0;
    float *param = calloc((size_t)size, sizeof *param);
    fo_plan *plan = fo_plan_create(fo_find_rule("sgd"), 1, 1);
    fo_step_args args = {.loss_scale = 1, .max_threads = threads, .pool = pool};
    fo_step_result result;
    EXPECT(param && plan);
    *fo_plan_tensor(plan, 0) = (fo_tensor){
        .param = param, .step = &count, .size = size, .dtype = fo_one_dtype(FO_F32), .grad = param};
    EXPECT(fo_plan_prepare(plan) == FO_OK);
    calls_of_pool = 0;
    for (int i = 0; i < steps; i++)
        fo_plan_step(plan, &args, &result);
    EXPECT(count == steps);
    fo_plan_destroy(plan);
    free(param);
    return calls_of_pool;
}

static void pools(void)
{
    const int64_t large = 1 << 21;
    const fo_pool pool = {run_alone, rank_alone};
    const int done = pooled(large, 2, &pool, 40);
    EXPECT(done >= 4);
    EXPECT(pooled(large, 2, NULL, 20) == 0);
    EXPECT(pooled(large, 1, &pool, 20) == 0);
    EXPECT(pooled(large / 4, 2, &pool, 40) == 0);
    EXPECT(pooled(large, 1000, &pool, 45) == 0); /* a part of a pool is another pool */
    EXPECT(fo_layer_select("serial") && pooled(large, 2, &pool, 40) == 0);
    EXPECT(fo_layer_select("team"));
}

enum { REGION_ITEMS = 100 };

typedef struct {
    pthread_t first[REGION_ITEMS], second[REGION_ITEMS]; /* who did an item in each pass */
    int decisions;
    bool follows;
} who;

static void first_pass(void *who_, int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end; i++)
        ((who *)who_)->first[i] = pthread_self();
}

static void second_pass(void *who_, int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end; i++)
        ((who *)who_)->second[i] = pthread_self();
}

static bool between_passes(void *who_)
{
    who *w = who_;
    EXPECT(w->first[0] && w->first[REGION_ITEMS - 1] && !w->second[0]);
    w->decisions++;
    return w->follows;
}

/* In an OpenMP region a thread keeps its items, in both passes and from step to step. */
static void regions(void)
{
    const fo_crew crew = {FO_OPENMP, .members = 3};
    const fo_passes passes = {first_pass, between_passes, second_pass};
    static who steps[3];
    for (int i = 0; i < 3; i++) {
        steps[i].follows = i < 2;
        EXPECT(fo_share(&crew, REGION_ITEMS, 1, &passes, &steps[i]) == 3);
        EXPECT(steps[i].decisions == 1);
        EXPECT(memcmp(steps[i].first, steps[0].first, sizeof steps[0].first) == 0);
    }
    EXPECT(memcmp(steps[0].second, steps[0].first, sizeof steps[0].first) == 0);
    EXPECT(memcmp(steps[1].second, steps[0].first, sizeof steps[0].first) == 0);
    EXPECT(steps[0].first[0] == pthread_self() && !steps[2].second[0]);
    int threads = 1;
    for (int i = 1; i < REGION_ITEMS; i++)
        threads += !pthread_equal(steps[0].first[i], steps[0].first[i - 1]);
    EXPECT(threads == 3);
}

/* A second pass follows a first one only if what comes between says so. */
static void passes_of_a_team(void)
{
    const fo_crew crew = {FO_TEAM, .exact = true, .members = 3};
    const fo_passes passes = {first_pass, between_passes, second_pass};
    static who steps[2];
    for (int i = 0; i < 2; i++) {
        steps[i].follows = i == 0;
        EXPECT(fo_share(&crew, REGION_ITEMS, 1, &passes, &steps[i]) == 3);
        EXPECT(steps[i].decisions == 1 && (steps[i].second[0] != 0) == steps[i].follows);
    }
}

/* How many threads a step of so many elements uses, of at most so many. */
static int threads_of(int64_t size, int threads)
{
    int64_t count = 0;
    float *param = calloc((size_t)size, sizeof *param);
    fo_plan *plan = fo_plan_create(fo_find_rule("sgd"), 1, 1);
    fo_step_args args = {.loss_scale = 1, .max_threads = threads};
    fo_step_result result;
    EXPECT(param && plan);
    *fo_plan_tensor(plan, 0) = (fo_tensor){
        .param = param, .step = &count, .size = size, .dtype = fo_one_dtype(FO_F32), .grad = param};
    EXPECT(fo_plan_prepare(plan) == FO_OK);
    fo_plan_step(plan, &args, &result);
    fo_plan_destroy(plan);
    free(param);
    return result.threads;
}

/* OpenMP's threads are as many in every step that is large enough for two. */
static void numbers_of_threads(void)
{
    EXPECT(fo_layer_select("openmp"));
    EXPECT(threads_of(100, 5) == 1 && threads_of(1 << 14, 5) == 5 && threads_of(1 << 20, 5) == 5);
    EXPECT(fo_layer_select("serial") && threads_of(1 << 20, 5) == 1);
    EXPECT(fo_layer_select("team"));
    EXPECT(fo_get_num_threads() == 1);
    fo_set_num_threads(7);
    EXPECT(fo_get_num_threads() == 7);
    fo_set_num_threads(1);
}

static void ranges(void)
{
    const fo_rule *adam = fo_find_rule("adam");
    for (int j = 0; adam->hyper_names[j]; j++) {
        const bool is_switch = isnan(adam->highs[j]),
                   is_beta = !strncmp(adam->hyper_names[j], "b", 1);
        EXPECT(fo_rule_takes(adam, j, adam->defaults[j]) && fo_rule_takes(adam, j, 0));
        EXPECT(!fo_rule_takes(adam, j, -1) && !fo_rule_takes(adam, j, NAN));
        EXPECT(fo_rule_takes(adam, j, 0.5) != is_switch);
        EXPECT(fo_rule_takes(adam, j, 1) == (is_switch || !is_beta));
    }
}

static void layers(void)
{
    const bool openmp = fo_layer_available(FO_OPENMP);
    EXPECT(fo_layer_active() == FO_TEAM && fo_layer_available(FO_SERIAL));
    EXPECT(!fo_layer_select("tbb") && !fo_layer_select("") && fo_layer_active() == FO_TEAM);
    EXPECT(fo_layer_select("openmp") == openmp && (!openmp || fo_openmp_processors() > 0));
    EXPECT(fo_layer_active() == (openmp ? FO_OPENMP : FO_TEAM) && fo_layer_select("team"));
}

int main(void)
{
    fo_init();
    layers();
    passes_of_a_team();
    if (fo_layer_available(FO_OPENMP)) {
        regions();
        numbers_of_threads();
    }
    ranges();
    allocations();
    rows_that_lack_memory();
    stored_arrays();
    gradients_that_widen();
    steps();
    buffers_that_begin();
    names();
    bandwidth();
    tuner();
    pools();
    printf("edges: %d wrong\n", wrong);
    return wrong != 0;
}
