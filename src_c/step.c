/* A step: every tensor of every group, block by block (update.c), in one pass.
 *
 * Threads take contiguous ranges of the blocks' numbers. Where a norm or a look for non-finite
 * values is asked for, a pass that reads all gradients comes first, and one thread then decides. */
#define _POSIX_C_SOURCE 199309L /* for fo_seconds */
#include "missed.h"
#include "plan.h"
#include "platform.h"
#include "team.h"
#include "update.h"
#include <math.h>
#include <string.h>

#define AT_A_TIME (1 << 13)    /* elements that a thread takes, on average and at least */
#define MIN_FOR_POOL (1 << 21) /* elements; to wait for all of its threads must not matter */

/* Does a pass over blocks begin to end, in whichever thread. `once` says that it goes over a block
 * only once: what need not stay in cache need not be cut up. */
FO_INLINE void for_blocks(const fo_step *s, int64_t begin, int64_t end, fo_block_pass *pass,
                          fo_rows_pass *pass_rows, bool once)
{
    const fo_plan *plan = s->plan;
    const int64_t *first = plan->first_block;
    _Alignas(64) char buffer[FO_BLOCK * sizeof(double)];
    const fo_fpenv saved = fo_fpenv_enter();

    int64_t k = 0, above = plan->n_pieces; /* bisect for the piece that holds `begin` */
    while (above - k > 1) {
        const int64_t middle = k + (above - k) / 2;
        if (first[middle] <= begin)
            k = middle;
        else
            above = middle;
    }
    for (int64_t block = begin, blocks; block < end; block += blocks) {
        while (block >= first[k + 1])
            k++;
        const piece *p = &plan->pieces[k];
        const fo_tensor *t = p->tensor;
        if (p->work->rows) {
            const fo_row_block *of_rows = &p->work->rows->blocks[block - first[k]];
            const int64_t from = of_rows->number * FO_BLOCK, to = from + FO_BLOCK;
            pass_rows(s, p, block, from, to < t->size ? to : t->size, of_rows->first, buffer);
            blocks = 1;
            continue;
        }
        const bool whole = once && t->grad_ndim == 0 && !t->ema && !t->sum;
        const bool direct = p->work->coded || t->dtype.of.grad == p->work->type;
        blocks = whole && direct ? first[k + 1] - block : 1;
        if (blocks > end - block)
            blocks = end - block;
        const int64_t offset = p->begin + (block - first[k]) * FO_BLOCK, most = blocks * FO_BLOCK;
        const int64_t left = p->end - offset;
        pass(s, p, block, offset, left < most ? left : most, buffer);
    }
    fo_fpenv_leave(saved);
}

static void scan_blocks(void *step_, int64_t begin, int64_t end)
{
    for_blocks(step_, begin, end, fo_scan_block, fo_scan_rows, false);
}

static void update_blocks(void *step_, int64_t begin, int64_t end)
{
    const fo_step *s = step_;
    for_blocks(s, begin, end, fo_update_block, fo_update_rows, !s->args->zero_grad);
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
 * another with the same step count, fresh slots and number share them. Returns how many elements the
 * step will touch. */
static int64_t assign_work(const fo_step *s)
{
    fo_plan *plan = s->plan;
    const double *hypers = plan->hypers;
    int64_t touched = 0;
    for (int32_t j = 0; j < plan->n_groups; j++, hypers += FO_MAX_HYPERS) {
        const int variant = plan->rule->variant(hypers);
        group_work *c = &plan->group_works[j];
        for (int type = 0; type < 2; type++)
            c->update[type] = s->table->update[type][plan->rule - fo_rules][variant];
        c->variant = (uint8_t)variant;
        c->slots = (uint8_t)slots_of(plan->rule, variant);
        c->by_row = slot_by_row(plan->rule, variant);
        c->maximize = ((const fo_common_hypers *)hypers)->maximize != 0;
        c->consts = NULL;
    }
    for (int64_t i = 0; i < plan->n_tensors; i++) {
        const fo_tensor *t = &plan->tensors[i];
        const bool part = has_gradient(s, t);
        if (part || (t->ema && !s->args->add))
            touched += plan->tensor_works[i].size;
        if (!part)
            continue;
        group_work *c = &plan->group_works[t->group];
        double number = 0;
        if (plan->number >= 0)
            memcpy(&number, t->slot[plan->number], sizeof number);
        if (!c->consts || c->step != *t->step || c->fresh != t->fresh || c->number != number) {
            double *consts = plan->consts + (size_t)i * FO_MAX_CONSTS;
            fo_rule_consts(plan->rule, plan->hypers + (size_t)t->group * FO_MAX_HYPERS,
                           s->args->semantics, *t->step + 1, t->fresh, number, consts);
            c->step = *t->step;
            c->fresh = t->fresh;
            c->number = number;
            c->consts = consts;
        }
        const double scale = unscale(s, t);
        tensor_work *w = &plan->tensor_works[i];
        describe(t, w);
        w->update = c->update[w->type];
        w->variant = c->variant;
        w->slots = c->slots;
        w->by_row = c->by_row;
        w->consts = c->consts;
        w->step = *t->step + 1;
        w->gscale = c->maximize ? -scale : scale;
        w->gmax = s->args->clip == FO_CLIP_VALUE ? s->args->clip_limit : INFINITY;
    }
    return touched;
}

/* Adds the blocks' sums in order, looks for non-finite values, clips. */
static void resolve_clipping(const fo_step *s)
{
    fo_plan *plan = s->plan;
    const fo_step_args *args = s->args;
    double total = 0, sum = 0;
    for (int64_t k = 0; k < plan->n_pieces; k++) {
        const piece *p = &plan->pieces[k];
        if (!args->squares && has_gradient(s, p->tensor))
            for (int64_t b = plan->first_block[k]; b < plan->first_block[k + 1]; b++) {
                sum += plan->block_sum[b];
                if (!plan->block_finite[b] && !s->result->skipped &&
                    args->nonfinite != FO_PROPAGATE) {
                    s->result->skipped = true;
                    s->result->first_skipped = p->tensor - plan->tensors;
                }
            }
        if (k + 1 < plan->n_pieces && p[1].tensor == p->tensor)
            continue; /* that is not all of the tensor */
        if (args->squares)
            sum = has_gradient(s, p->tensor) ? args->squares[p->tensor - plan->tensors] : 0;
        total += sum;
        if (args->clip == FO_CLIP_NORM)
            p->work->gscale *= clip_factor(args, sqrt(sum));
        sum = 0;
    }
    s->result->has_norm = norm_needed(args);
    s->result->grad_norm = sqrt(total);
    if (args->clip == FO_GLOBAL_CLIP_NORM) {
        const double factor = clip_factor(args, s->result->grad_norm);
        for (int64_t i = 0; i < plan->n_tensors; i++)
            plan->tensor_works[i].gscale *= factor;
    }
}

/* Between the passes: returns whether the second follows. */
static bool between_passes(void *step_)
{
    const fo_step *s = step_;
    resolve_clipping(s);
    return !s->result->skipped || (s->args->nonfinite == FO_SKIP && s->args->zero_grad);
}

/* After a step: counts it, keeps its number, and notes which slots and sums hold something. */
static void advance_counters(const fo_step *s)
{
    fo_tensor *t = s->plan->tensors;
    const tensor_work *w = s->plan->tensor_works;
    const bool add = s->args->add;
    const unsigned begins = s->plan->begins;
    const int number = s->plan->number;
    for (const fo_tensor *end = t + s->plan->n_tensors; t < end; t++, w++) {
        if (!has_gradient(s, t))
            continue;
        if (!add && begins)
            t->fresh = (*t->step == 0 ? begins : t->fresh) & ~(unsigned)w->slots;
        if (!add && number >= 0)
            memcpy(t->slot[number], &w->consts[NUMBER_KEPT], sizeof(double));
        if (!add)
            ++*t->step;
        if (t->sum)
            t->has_sum = add;
    }
}

/* How many of the threads that a step may use pay where so many elements are touched. */
static fo_crew crew_for(const fo_step_args *args, int64_t touched)
{
    const int64_t useful = touched / MIN_PER_THREAD;
    fo_crew crew = {fo_layer_active(), args->exact, args->max_threads, NULL};
    if (!args->exact && useful < crew.members) /* OpenMP's threads are always the same number */
        crew.members = crew.layer == FO_OPENMP && useful > 1 ? crew.members : (int)useful;
    return crew;
}

/* Blocks that a thread takes at a time. */
static int64_t grain_of(const fo_plan *plan)
{
    return AT_A_TIME * plan->n_blocks / (plan->size + 1) + 1;
}

void fo_plan_scan(fo_plan *plan, const fo_step_args *args, double *sums, bool *finite)
{
    fo_step_result result = {0};
    fo_step s = {plan, args, &result, fo_active_table(), 1 / args->loss_scale};
    const fo_fpenv saved = fo_fpenv_enter();
    fo_crew crew = crew_for(args, assign_work(&s));
    const fo_passes passes = {NULL, NULL, scan_blocks};
    for (int64_t b = 0; b < plan->n_blocks; b++) {
        plan->block_sum[b] = 0;
        plan->block_finite[b] = true;
    }
    fo_share(&crew, plan->n_blocks, grain_of(plan), &passes, &s);
    memcpy(sums, plan->block_sum, (size_t)plan->n_blocks * sizeof *sums);
    memcpy(finite, plan->block_finite, (size_t)plan->n_blocks * sizeof *finite);
    fo_fpenv_leave(saved);
}

void fo_plan_step(fo_plan *plan, const fo_step_args *args, fo_step_result *result)
{
    fo_step s = {plan, args, result, fo_active_table(), 1 / args->loss_scale};
    memset(result, 0, sizeof *result);
    const fo_fpenv saved = fo_fpenv_enter();
    const int64_t touched = assign_work(&s);
    fo_crew crew = crew_for(args, touched);
    fo_tuner *tuner = &plan->tuners[args->add];
    const bool tuned = crew.layer == FO_TEAM && !args->exact && crew.members > 1;
    const double begin = tuned ? fo_seconds() : 0;
    int choice = 0;
    if (tuned) {
        const bool pool = args->pool && touched >= MIN_FOR_POOL && args->max_threads <= FO_MAX_TEAM;
        choice = fo_tuner_choose(tuner, fo_tuner_last(crew.members), pool);
        crew.members = fo_tuner_threads(choice, crew.members);
        if (choice == TUNER_POOL)
            crew.pool = args->pool;
    }

    const bool scans = !args->squares && (norm_needed(args) || args->nonfinite != FO_PROPAGATE);
    if (args->squares)
        resolve_clipping(&s);
    const fo_passes passes = {scans ? scan_blocks : NULL, between_passes, update_blocks};
    result->threads = fo_share(&crew, plan->n_blocks, grain_of(plan), &passes, &s);
    if (tuned)
        fo_tuner_learn(tuner, choice, result->threads, fo_seconds() - begin, (double)touched);
    if (!result->skipped) {
        advance_counters(&s);
        fo_log_missed(&s, &crew);
    }
    fo_fpenv_leave(saved);
}
