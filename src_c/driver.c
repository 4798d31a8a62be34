/* A step: every tensor of every group, block by block, in one pass.
 *
 * Blocks of FO_BLOCK elements are numbered through all tensors, and threads take contiguous ranges
 * of the numbers. Where a norm or a look for non-finite values is asked for, a pass that reads all
 * gradients comes first, and one thread then decides. */
#define _POSIX_C_SOURCE 199309L /* for fo_seconds */
#include "kernels.h"
#include "platform.h"
#include "rule.h"
#include "team.h"
#include "tuner.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DIMS 64 /* axes of a gradient; NumPy allows no more */

#define AT_A_TIME (1 << 13)      /* elements that a thread takes, on average and at least */
#define MIN_PER_THREAD (1 << 13) /* elements; no thread can pay for fewer */
#define LEAST_FOR_POOL (1 << 21) /* elements; to wait for all of its threads must not matter */

#define CACHE_LINE 64      /* bytes */
#define LEAST_TO_ALIGN 256 /* elements */

/* What a step makes of a tensor before it writes anything. */
typedef struct {
    fo_update *update;
    const double *consts;
    double gscale;
} work;

/* What the tensors of a group have in common at a step. */
typedef struct {
    fo_update *update[2]; /* by dtype */
    bool maximize;
    unsigned skipped;     /* slots that begin, but not with this step */
    const double *consts; /* computed last, and for what; NULL: not yet */
    int64_t step;
    unsigned fresh;
} common;

struct fo_plan {
    const fo_rule *rule;
    bool begins; /* whether the rule has a slot that does */
    int32_t n_groups;
    int64_t n_tensors, n_blocks, size;
    fo_tensor *tensors;
    double *hypers;       /* FO_MAX_HYPERS a group */
    double *consts;       /* FO_MAX_CONSTS a tensor */
    work *works;          /* one a tensor */
    common *commons;      /* one a group */
    int64_t *first_block; /* of each tensor, and n_blocks at the end */
    fo_tuner tuners[2];   /* how many threads have paid; [1]: where gradients were only added */
    int64_t block_room;   /* blocks that the next two are for */
    double *block_sum;    /* of squares, unscaled gradients */
    bool *block_finite;   /* whether all its values are */
};

static const size_t item_size[] = {sizeof(float), sizeof(double)};

/* ---- life ----------------------------------------------------------------------------------- */

void fo_init(void)
{
    fo_select_default_table();
    fo_team_init();
}

fo_plan *fo_plan_create(const fo_rule *rule, int32_t n_groups, int64_t n_tensors)
{
    fo_plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return NULL;
    const size_t n = (size_t)n_tensors, groups = (size_t)n_groups;
    plan->rule = rule;
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        plan->begins |= fo_rule_slot_begins(rule, j);
    plan->n_groups = n_groups;
    plan->n_tensors = n_tensors;
    plan->tensors = calloc(n + 1, sizeof *plan->tensors);
    plan->hypers = calloc(groups + 1, FO_MAX_HYPERS * sizeof *plan->hypers);
    plan->consts = calloc(n + 1, FO_MAX_CONSTS * sizeof *plan->consts);
    plan->works = calloc(n + 1, sizeof *plan->works);
    plan->commons = calloc(groups + 1, sizeof *plan->commons);
    plan->first_block = calloc(n + 1, sizeof *plan->first_block);
    if (plan->tensors && plan->hypers && plan->consts && plan->works && plan->commons &&
        plan->first_block)
        return plan;
    fo_plan_destroy(plan);
    return NULL;
}

fo_status fo_plan_prepare(fo_plan *plan)
{
    int64_t blocks = 0;
    plan->size = 0;
    for (int64_t i = 0; i < plan->n_tensors; i++) {
        const int64_t size = plan->tensors[i].size;
        plan->first_block[i] = blocks;
        blocks += size / FO_BLOCK + (size % FO_BLOCK != 0);
        plan->size += size;
    }
    plan->first_block[plan->n_tensors] = plan->n_blocks = blocks;
    if (blocks < plan->block_room)
        return FO_OK;
    free(plan->block_sum);
    free(plan->block_finite);
    plan->block_sum = calloc((size_t)blocks + 1, sizeof *plan->block_sum);
    plan->block_finite = calloc((size_t)blocks + 1, sizeof *plan->block_finite);
    plan->block_room = plan->block_sum && plan->block_finite ? blocks + 1 : 0;
    return plan->block_room ? FO_OK : FO_NO_MEMORY;
}

void fo_plan_destroy(fo_plan *plan)
{
    if (!plan)
        return;
    free(plan->tensors);
    free(plan->hypers);
    free(plan->consts);
    free(plan->works);
    free(plan->commons);
    free(plan->first_block);
    free(plan->block_sum);
    free(plan->block_finite);
    free(plan);
}

fo_tensor *fo_plan_tensor(fo_plan *plan, int64_t i) { return &plan->tensors[i]; }

double *fo_plan_hypers(fo_plan *plan, int32_t group)
{
    return plan->hypers + (size_t)group * FO_MAX_HYPERS;
}

int64_t fo_plan_size(const fo_plan *plan) { return plan->size; }

/* ---- a gradient that is laid out otherwise than its parameter -------------------------------- */

/* Copies n elements of the gradient, from `offset` in the parameter's memory order, to `to`; or,
 * where `to` is NULL, zeroes them in place. */
static void gather(const fo_tensor *t, int64_t offset, int64_t n, char *to)
{
    const int last = t->grad_ndim - 1;
    const ptrdiff_t step = t->grad_strides[last];
    const size_t item = item_size[t->dtype];
    ptrdiff_t index[MAX_DIMS];
    char *at = t->grad;
    for (int axis = last; axis >= 0; axis--) {
        index[axis] = (ptrdiff_t)(offset % t->grad_shape[axis]);
        offset /= t->grad_shape[axis];
        at += index[axis] * t->grad_strides[axis];
    }
    while (n > 0) {
        const int64_t left = t->grad_shape[last] - index[last], run = n < left ? n : left;
        if (!to) {
            for (int64_t i = 0; i < run; i++)
                memset(at + i * step, 0, item);
        } else if (item == sizeof(float)) {
            for (int64_t i = 0; i < run; i++)
                memcpy(to + i * (int64_t)sizeof(float), at + i * step, sizeof(float));
        } else {
            for (int64_t i = 0; i < run; i++)
                memcpy(to + i * (int64_t)sizeof(double), at + i * step, sizeof(double));
        }
        n -= run;
        if (to)
            to += (size_t)run * item;
        at -= index[last] * step;
        index[last] = 0;
        for (int axis = last - 1; axis >= 0; axis--) { /* the odometer's next number */
            at += t->grad_strides[axis];
            if (++index[axis] < t->grad_shape[axis])
                break;
            at -= index[axis] * t->grad_strides[axis];
            index[axis] = 0;
        }
    }
}

/* The block's gradient, as it is given, as contiguous memory. */
static const void *contiguous_grad(const fo_tensor *t, int64_t offset, int64_t n, char *buffer)
{
    if (t->grad_ndim == 0)
        return (const char *)t->grad + (size_t)offset * item_size[t->dtype];
    gather(t, offset, n, buffer);
    return buffer;
}

static void zero_grad(const fo_tensor *t, int64_t offset, int64_t n)
{
    const size_t item = item_size[t->dtype];
    if (t->grad_ndim == 0)
        memset((char *)t->grad + (size_t)offset * item, 0, (size_t)n * item);
    else
        gather(t, offset, n, NULL);
}

/* ---- what is done to a block ----------------------------------------------------------------- */

typedef struct {
    fo_plan *plan;
    const fo_step_args *args;
    fo_step_result *result;
    const fo_table *table;
    double scale; /* 1 / loss_scale */
} step;

/* Whether this step has a gradient for the tensor, of this micro-batch or of an earlier one. */
static bool takes_part(const step *s, const fo_tensor *t)
{
    return t->grad || (t->has_sum && !s->args->add);
}

/* What the given gradient is still to be multiplied by; sums have it behind them. */
static double unscale(const step *s, const fo_tensor *t) { return t->sum ? 1 : s->scale; }

/* The block's gradient, summed over micro-batches so far; at the last one, their mean. */
static const void *mean_grad(const step *s, const fo_tensor *t, int64_t offset, int64_t n,
                             char *buffer)
{
    const char *sum = (const char *)t->sum + (size_t)offset * item_size[t->dtype];
    const void *grad = t->grad ? contiguous_grad(t, offset, n, buffer) : NULL;
    s->table->mean[t->dtype](n, buffer, t->has_sum ? sum : NULL, grad, s->scale,
                             s->args->add ? 1 : (double)s->args->accumulate);
    return buffer;
}

FO_INLINE const void *whole_grad(const step *s, const fo_tensor *t, int64_t offset, int64_t n,
                                 char *buffer)
{
    return t->sum ? mean_grad(s, t, offset, n, buffer) : contiguous_grad(t, offset, n, buffer);
}

typedef void block_pass(const step *s, int64_t tensor, int64_t block, int64_t offset, int64_t n,
                        char *buffer);

static void scan_block(const step *s, int64_t tensor, int64_t block, int64_t offset, int64_t n,
                       char *buffer)
{
    const fo_tensor *t = &s->plan->tensors[tensor];
    if (!takes_part(s, t))
        return;
    const void *grad = whole_grad(s, t, offset, n, buffer);
    const double scale = unscale(s, t);
    const double sum = s->table->sum_of_squares[t->dtype](n, grad, scale);
    s->plan->block_sum[block] = sum;
    /* A finite sum has finite terms; one that is not may have overflowed. */
    s->plan->block_finite[block] = sum - sum == 0 || s->table->all_finite[t->dtype](n, grad, scale);
}

/* Calls a loop: at first for what comes before a cache line, so that no vector of the parameter lies
 * in two, and none of the other arrays if they begin alike. */
static void update(const work *w, size_t item, int64_t n, char *param, const char *grad,
                   void **slot, double gmax)
{
    const int64_t head =
        n < LEAST_TO_ALIGN ? 0 : (int64_t)((-(uintptr_t)param & (CACHE_LINE - 1)) / item);
    if (head > 0) {
        w->update(head, param, grad, slot, w->consts, w->gscale, gmax);
        for (int j = 0; j < FO_MAX_SLOTS; j++)
            slot[j] = slot[j] ? (char *)slot[j] + (size_t)head * item : NULL;
    }
    w->update(n - head, param + (size_t)head * item, grad + (size_t)head * item, slot, w->consts,
              w->gscale, gmax);
}

static void update_block(const step *s, int64_t tensor, int64_t block, int64_t offset, int64_t n,
                         char *buffer)
{
    const fo_tensor *t = &s->plan->tensors[tensor];
    const work *w = &s->plan->works[tensor];
    const size_t start = (size_t)offset * item_size[t->dtype];
    char *param = (char *)t->param + start;
    (void)block;
    const bool part = takes_part(s, t) && !s->result->skipped;
    if (part && s->args->add) {
        memcpy((char *)t->sum + start, mean_grad(s, t, offset, n, buffer),
               (size_t)n * item_size[t->dtype]);
    } else if (part) {
        void *slot[FO_MAX_SLOTS];
        for (int j = 0; j < FO_MAX_SLOTS; j++)
            slot[j] = t->slot[j] ? (char *)t->slot[j] + start : NULL;
        const double gmax = s->args->clip == FO_CLIP_VALUE ? s->args->clip_limit : INFINITY;
        update(w, item_size[t->dtype], n, param, whole_grad(s, t, offset, n, buffer), slot, gmax);
    }
    if (t->ema && !s->result->skipped && !s->args->add) {
        char *ema = (char *)t->ema + start;
        if (s->args->ema_starts)
            memcpy(ema, param, (size_t)n * item_size[t->dtype]);
        else
            s->table->average[t->dtype](n, ema, param, s->args->ema_decay);
    }
    if (t->grad && s->args->zero_grad)
        zero_grad(t, offset, n);
}

/* Does a pass over blocks begin to end, in whichever thread. `once` says that it goes over a block
 * only once: what need not stay in cache need not be cut up. */
FO_INLINE void for_blocks(const step *s, int64_t begin, int64_t end, block_pass *pass, bool once)
{
    const fo_plan *plan = s->plan;
    const int64_t *first = plan->first_block;
    _Alignas(64) char buffer[FO_BLOCK * sizeof(double)];
    const fo_fpenv saved = fo_fpenv_enter();

    int64_t tensor = 0, above = plan->n_tensors; /* bisect for the tensor that holds `begin` */
    while (above - tensor > 1) {
        const int64_t middle = tensor + (above - tensor) / 2;
        if (first[middle] <= begin)
            tensor = middle;
        else
            above = middle;
    }
    for (int64_t block = begin, blocks; block < end; block += blocks) {
        while (block >= first[tensor + 1])
            tensor++;
        const fo_tensor *t = &plan->tensors[tensor];
        blocks = once && t->grad_ndim == 0 && !t->ema && !t->sum ? first[tensor + 1] - block : 1;
        if (blocks > end - block)
            blocks = end - block;
        const int64_t offset = (block - first[tensor]) * FO_BLOCK, most = blocks * FO_BLOCK;
        const int64_t left = t->size - offset;
        pass(s, tensor, block, offset, left < most ? left : most, buffer);
    }
    fo_fpenv_leave(saved);
}

static void scan_blocks(void *step_, int64_t begin, int64_t end)
{
    for_blocks(step_, begin, end, scan_block, false);
}

static void update_blocks(void *step_, int64_t begin, int64_t end)
{
    const step *s = step_;
    for_blocks(s, begin, end, update_block, !s->args->zero_grad);
}

/* ---- the step -------------------------------------------------------------------------------- */

static bool norm_needed(const fo_step_args *args)
{
    return !args->add && (args->clip == FO_CLIP_NORM || args->clip == FO_GLOBAL_CLIP_NORM);
}

/* The factor that clips a gradient of this norm; NaN for a NaN norm. */
static double clip_factor(const fo_step_args *args, double norm)
{
    const double limit = args->clip_limit;
    if (isinf(limit)) /* no limit, and 1 for any norm but a NaN */
        return norm != norm ? norm : 1;
    if (args->semantics == FO_KERAS && args->clip == FO_GLOBAL_CLIP_NORM) {
        const double most = 1 / limit, inverse = 1 / norm;
        return limit * (inverse < most ? inverse : most) + (norm - norm); /* NaN for Inf, too */
    }
    if (args->semantics == FO_KERAS)
        return limit / (norm > limit || norm != norm ? norm : limit);
    const double factor = limit / (norm + 1e-6);
    return factor < 1 || factor != factor ? factor : 1;
}

/* Chooses each tensor's loop and computes its constants. Within a group, tensors that follow one
 * another with the same step count and fresh slots share them. Returns how many elements the step
 * will touch. */
static int64_t assign_work(const step *s)
{
    fo_plan *plan = s->plan;
    const double *hypers = plan->hypers;
    const int *needs = plan->rule->slot_needs;
    int64_t touched = 0;
    for (int32_t j = 0; j < plan->n_groups; j++, hypers += FO_MAX_HYPERS) {
        const int variant = plan->rule->variant(hypers);
        common *c = &plan->commons[j];
        for (int dtype = 0; dtype < 2; dtype++)
            c->update[dtype] = s->table->update[dtype][plan->rule - fo_rules][variant];
        c->maximize = ((const fo_common_hypers *)hypers)->maximize != 0;
        c->skipped = 0;
        for (int k = 0; k < FO_MAX_SLOTS; k++)
            if ((needs[k] & BEGINS) && !fo_slot_used(needs[k], variant))
                c->skipped |= FO_SLOT(k);
        c->consts = NULL;
    }
    for (int64_t i = 0; i < plan->n_tensors; i++) {
        const fo_tensor *t = &plan->tensors[i];
        const bool part = takes_part(s, t);
        if (part || (t->ema && !s->args->add))
            touched += t->size;
        if (!part)
            continue;
        common *c = &plan->commons[t->group];
        if (!c->consts || c->step != *t->step || c->fresh != t->fresh) {
            double *consts = plan->consts + (size_t)i * FO_MAX_CONSTS;
            fo_rule_consts(plan->rule, plan->hypers + (size_t)t->group * FO_MAX_HYPERS,
                           s->args->semantics, *t->step + 1, t->fresh, consts);
            c->step = *t->step;
            c->fresh = t->fresh;
            c->consts = consts;
        }
        const double scale = unscale(s, t);
        plan->works[i] = (work){c->update[t->dtype], c->consts, c->maximize ? -scale : scale};
    }
    return touched;
}

/* Adds the blocks' sums in order, looks for non-finite values, clips. */
static void resolve(const step *s)
{
    fo_plan *plan = s->plan;
    const fo_step_args *args = s->args;
    double total = 0;
    for (int64_t i = 0; i < plan->n_tensors; i++) {
        const fo_tensor *t = &plan->tensors[i];
        if (!takes_part(s, t))
            continue;
        double sum = 0;
        for (int64_t b = plan->first_block[i]; b < plan->first_block[i + 1]; b++) {
            sum += plan->block_sum[b];
            if (!plan->block_finite[b] && !s->result->skipped && args->nonfinite != FO_PROPAGATE) {
                s->result->skipped = true;
                s->result->first_skipped = i;
            }
        }
        total += sum;
        if (args->clip == FO_CLIP_NORM)
            plan->works[i].gscale *= clip_factor(args, sqrt(sum));
    }
    s->result->has_norm = norm_needed(args);
    s->result->grad_norm = sqrt(total);
    if (args->clip == FO_GLOBAL_CLIP_NORM) {
        const double factor = clip_factor(args, s->result->grad_norm);
        for (int64_t i = 0; i < plan->n_tensors; i++)
            plan->works[i].gscale *= factor;
    }
}

/* Between the passes: returns whether the second follows. */
static bool decide(void *step_)
{
    const step *s = step_;
    resolve(s);
    return !s->result->skipped || (s->args->nonfinite == FO_SKIP && s->args->zero_grad);
}

/* After a step: counts it, and notes which slots and sums hold something. */
static void count(const step *s)
{
    fo_tensor *t = s->plan->tensors;
    const bool add = s->args->add, begins = s->plan->begins;
    for (const fo_tensor *end = t + s->plan->n_tensors; t < end; t++) {
        if (!takes_part(s, t))
            continue;
        if (!add && begins)
            t->fresh = (*t->step == 0 ? ~0u : t->fresh) & s->plan->commons[t->group].skipped;
        if (!add)
            ++*t->step;
        if (t->sum)
            t->has_sum = add;
    }
}

void fo_plan_step(fo_plan *plan, const fo_step_args *args, fo_step_result *result)
{
    step s = {plan, args, result, fo_active_table(), 1 / args->loss_scale};
    memset(result, 0, sizeof *result);
    const fo_fpenv saved = fo_fpenv_enter();
    const int64_t touched = assign_work(&s), useful = touched / MIN_PER_THREAD;
    fo_crew crew = {fo_layer_active(), args->exact, args->max_threads, NULL};
    if (!args->exact && useful < crew.members) /* OpenMP's threads are always the same number */
        crew.members = crew.layer == FO_OPENMP && useful > 1 ? crew.members : (int)useful;
    fo_tuner *tuner = &plan->tuners[args->add];
    const bool tuned = crew.layer == FO_TEAM && !args->exact && crew.members > 1;
    const double begin = tuned ? fo_seconds() : 0;
    int choice = 0;
    if (tuned) {
        const bool pool =
            args->pool && touched >= LEAST_FOR_POOL && args->max_threads <= FO_MAX_TEAM;
        choice = fo_tuner_choose(tuner, fo_tuner_last(crew.members), pool);
        crew.members = fo_tuner_threads(choice, crew.members);
        if (choice == TUNER_POOL)
            crew.pool = args->pool;
    }

    const bool scans = norm_needed(args) || args->nonfinite != FO_PROPAGATE;
    const fo_passes passes = {scans ? scan_blocks : NULL, decide, update_blocks};
    const int64_t grain = AT_A_TIME * plan->n_blocks / (plan->size + 1) + 1;
    result->threads = fo_share(&crew, plan->n_blocks, grain, &passes, &s);
    if (tuned)
        fo_tuner_learn(tuner, choice, result->threads, fo_seconds() - begin, (double)touched);
    if (!result->skipped)
        count(&s);
    fo_fpenv_leave(saved);
}
