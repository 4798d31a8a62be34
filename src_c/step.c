/* A step: every tensor of every group, block by block, in one pass.
 *
 * Threads take contiguous ranges of the blocks' numbers. Where a norm or a look for non-finite
 * values is asked for, a pass that reads all gradients comes first, and one thread then decides. */
#define _POSIX_C_SOURCE 199309L /* for fo_seconds */
#include "plan.h"
#include "platform.h"
#include "random.h"
#include "rule.h"
#include "team.h"
#include <math.h>
#include <string.h>

#define AT_A_TIME (1 << 13)      /* elements that a thread takes, on average and at least */
#define MIN_PER_THREAD (1 << 13) /* elements; no thread can pay for fewer */
#define MIN_FOR_POOL (1 << 21)   /* elements; to wait for all of its threads must not matter */

#define CACHE_LINE 64    /* bytes */
#define MIN_TO_ALIGN 256 /* elements */

/* ---- what is done to a block ----------------------------------------------------------------- */

/* Does n elements of a piece, from `offset` of its tensor on, where this block begins. */
typedef void block_pass(const fo_step *s, const piece *p, int64_t block, int64_t offset, int64_t n,
                        char *buffer);

static void scan_block(const fo_step *s, const piece *p, int64_t block, int64_t offset, int64_t n,
                       char *buffer)
{
    const fo_tensor *t = p->tensor;
    const tensor_work *w = p->work;
    const int64_t at = offset + p->to_grad;
    if (!has_gradient(s, t))
        return;
    const void *grad = effective_grad(s, t, w, offset, at, n, buffer);
    const double scale = unscale(s, t);
    const double sum = s->table->sum_of_squares[w->type](n, grad, scale);
    s->plan->block_sum[block] = sum;
    /* A finite sum has finite terms; one that is not may have overflowed. */
    s->plan->block_finite[block] = sum - sum == 0 || s->table->all_finite[w->type](n, grad, scale);
}

/* Calls a loop: at first for what comes before a cache line, so that no vector of the parameter lies
 * in two cache lines; nor do those of the other arrays, if they begin at the same place in a line. */
static void update(const tensor_work *w, int64_t n, char *param, const char *grad, void **slot,
                   double gmax)
{
    const size_t item = w->item;
    const int64_t head =
        n < MIN_TO_ALIGN ? 0 : (int64_t)((-(uintptr_t)param & (CACHE_LINE - 1)) / item);
    if (head > 0) {
        w->update(head, param, grad, slot, w->consts, w->gscale, gmax);
        for (int j = 0; j < FO_MAX_SLOTS; j++)
            slot[j] = slot[j] ? (char *)slot[j] + (size_t)head * item : NULL;
    }
    w->update(n - head, param + (size_t)head * item, grad + (size_t)head * item, slot, w->consts,
              w->gscale, gmax);
}

/* The slots that a tensor's update touches. */
static unsigned used_slots(const fo_step *s, const fo_tensor *t)
{
    unsigned slots = 0;
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        if (fo_slot_used(s->plan->rule->slot_needs[j], s->plan->group_works[t->group].variant))
            slots |= FO_SLOT(j);
    return slots;
}

/* A tensor's arrays: 0 is the parameter, 1 + j is slot j. */
static array array_of(const fo_tensor *t, const fo_coding *coding, int number)
{
    if (number == 0)
        return (array){t->dtype.of.param, t->param, coding->beside[0]};
    return (array){t->dtype.of.slot[number - 1], t->slot[number - 1], coding->beside[number]};
}

/* The loop that is made for what is stored as it is here, or NULL. */
static fo_fused *find_fused(const fo_step *s, const fo_tensor *t, unsigned slots)
{
    static const uint8_t types[][3] = {
#define FO_FUSED_TYPES(name, param, grad, state, unused)                                           \
    {FO_DTYPE_##param, FO_DTYPE_##grad, FO_DTYPE_##state},
        FO_EACH_FUSED(FO_FUSED_TYPES, )};
    const int *needs = s->plan->rule->slot_needs;
    if (t->grad_ndim != 0 || t->sum)
        return NULL;
    for (int k = 0; k < FO_FUSED_COUNT; k++) {
        bool same = t->dtype.of.param == types[k][0] && t->dtype.of.grad == types[k][1];
        for (int j = 0; j < FO_MAX_SLOTS && same; j++) {
            if (slots & FO_SLOT(j))
                same = t->dtype.of.slot[j] == (needs[j] & EXACT ? FO_F32 : types[k][2]);
        }
        if (same)
            return s->table
                ->fused[s->plan->rule - fo_rules][k][s->plan->group_works[t->group].variant];
    }
    return NULL;
}

/* How many elements, an even number, come before a cache line of the array that has the most bytes:
 * none of its vectors then lies in two, and few of the others' do. */
static int64_t before_line(const fo_step *s, const fo_tensor *t, unsigned slots, int64_t offset)
{
    array widest = array_of(t, &s->plan->codings[t - s->plan->tensors], 0);
    for (int j = 0; j < FO_MAX_SLOTS; j++) {
        const array a = {t->dtype.of.slot[j], t->slot[j], NULL};
        if (slots & FO_SLOT(j) && fo_storages[a.dtype].bytes > fo_storages[widest.dtype].bytes)
            widest = a;
    }
    const size_t item = fo_storages[widest.dtype].bytes;
    const uintptr_t at = (uintptr_t)widest.data + (size_t)offset * item;
    return (int64_t)((-at & (CACHE_LINE - 1)) / item) & ~INT64_C(1);
}

/* Does what a loop made for it can, from `offset` on; returns how many elements that are. */
static int64_t update_fused(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                            int64_t offset, int64_t at, int64_t n, uint64_t key, unsigned slots,
                            double gmax)
{
    const fo_coding *coding = &s->plan->codings[t - s->plan->tensors];
    const int64_t element = coding->first + offset, upper = element >> 32;
    const int64_t left = ((upper + 1) << 32) - element; /* that have the upper half in common */
    fo_fused *const fused = find_fused(s, t, slots);
    fo_stored stored[1 + FO_MAX_SLOTS] = {{NULL, NULL}};
    if (!fused || element % 2 != 0)
        return 0;
    unsigned random = 0; /* arrays that could be rounded at random: all of them are, or none */
    for (int j = 0; j <= FO_MAX_SLOTS; j++) {
        const array a = array_of(t, coding, j);
        if (j != 0 && !(slots & FO_SLOT(j - 1)))
            continue;
        stored[j] = (fo_stored){(char *)a.data + (size_t)offset * fo_storages[a.dtype].bytes,
                                beside_at(&a, offset)};
        if (a.dtype != FO_F32 && a.dtype != FO_BF16_SPLIT)
            random |= FO_SLOT(j);
    }
    const unsigned stochastic = coding->stochastic & random;
    if (stochastic != random && stochastic != 0)
        return 0;
    n = n < left ? n : left;
    n -= n % 2;
    const int64_t head = n < MIN_TO_ALIGN ? 0 : before_line(s, t, slots, offset);
    n = head > 0 ? head : n;
    const fo_stored grad = {(char *)t->grad + (size_t)at * fo_storages[t->dtype.of.grad].bytes,
                            NULL};
    fused(n, stored, &grad, stochastic != 0, fo_key(key, upper), (uint32_t)element, w->consts,
          w->gscale, gmax);
    return n;
}

/* Has the processor fetch what comes next: it does not foresee it, where several arrays are read by
 * turns, a stretch of each. (Inlined, since GCC drops calls of what only prefetches.) */
FO_INLINE void fetch(const array *a, int64_t offset, int64_t n)
{
    const fo_storage *storage = &fo_storages[a->dtype];
    const char *at = (const char *)a->data + (size_t)offset * storage->bytes;
    for (size_t k = 0; k < (size_t)n * storage->bytes; k += CACHE_LINE)
        __builtin_prefetch(at + k);
    at = beside_at(a, offset);
    for (size_t k = 0; at && k < (size_t)n * storage->beside / (size_t)storage->per;
         k += CACHE_LINE)
        __builtin_prefetch(at + k);
}

/* The same where something is stored in another type than the rule computes in: stretches that fit
 * the first cache are decoded, updated and encoded again. Their gradient is from `at` on. */
FO_APART void update_coded(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                           int64_t offset, int64_t at, int64_t n, double gmax)
{
    _Alignas(64) char buffers[2 + FO_MAX_SLOTS][FO_STRETCH * sizeof(double)];
    _Alignas(64) uint16_t random[1 + FO_MAX_SLOTS][FO_STRETCH];
    const fo_coding *coding = &s->plan->codings[t - s->plan->tensors];
    const unsigned slots = used_slots(s, t);
    const array grads = {t->dtype.of.grad, t->grad, NULL};
    const int64_t end = offset + n;
    uint64_t key = fo_mix64(coding->seed + FO_GOLDEN);
    key = fo_key(fo_key(key, *t->step + 1), coding->index);

    for (int64_t done = 1; done > 0; offset += done, at += done)
        done = offset < end ? update_fused(s, t, w, offset, at, end - offset, key, slots, gmax) : 0;
    for (; offset < end; offset += FO_STRETCH, at += FO_STRETCH) {
        const int64_t m = end - offset < FO_STRETCH ? end - offset : FO_STRETCH;
        const int64_t left = t->size - offset - m, next = left < FO_STRETCH ? left : FO_STRETCH;
        const void *grad = effective_grad(s, t, w, offset, at, m, buffers[1 + FO_MAX_SLOTS]);
        void *elements[1 + FO_MAX_SLOTS] = {NULL};
        if (t->grad && t->grad_ndim == 0)
            fetch(&grads, at + m, next);
        for (int j = 0; j <= FO_MAX_SLOTS; j++) {
            const array a = array_of(t, coding, j);
            if (j == 0 || slots & FO_SLOT(j - 1)) {
                elements[j] = decoded(s, &a, offset, m, buffers[j]);
                fetch(&a, offset + m, next);
            }
        }
        w->update(m, elements[0], grad, elements + 1, w->consts, w->gscale, gmax);
        if (coding->stochastic)
            s->table->random(m, random, coding->stochastic, key, coding->first + offset);
        for (int j = 0; j <= FO_MAX_SLOTS; j++) {
            const array a = array_of(t, coding, j);
            if (elements[j])
                put(s, &a, offset, m, elements[j],
                    coding->stochastic & FO_SLOT(j) ? random[j] : NULL);
        }
    }
}

FO_APART void average(const fo_step *s, const fo_tensor *t, int64_t offset, int64_t n)
{
    _Alignas(64) char buffers[2][FO_STRETCH * sizeof(double)];
    const fo_dtype type = arithmetic_of(t);
    const int64_t most = is_coded(t, type) ? FO_STRETCH : n;
    const fo_coding *coding = &s->plan->codings[t - s->plan->tensors];
    const array params = array_of(t, coding, 0), averages = {t->dtype.of.ema, t->ema, NULL};
    for (int64_t end = offset + n; offset < end; offset += most) {
        const int64_t m = end - offset < most ? end - offset : most;
        const void *param = decoded(s, &params, offset, m, buffers[0]);
        if (s->args->ema_starts) {
            put(s, &averages, offset, m, param, NULL);
        } else {
            void *ema = decoded(s, &averages, offset, m, buffers[1]);
            s->table->average[type](m, ema, param, s->args->ema_decay);
            put(s, &averages, offset, m, ema, NULL);
        }
    }
}

static void update_block(const fo_step *s, const piece *p, int64_t block, int64_t offset, int64_t n,
                         char *buffer)
{
    const fo_tensor *t = p->tensor;
    const tensor_work *w = p->work;
    const int64_t at = offset + p->to_grad;
    (void)block;
    const bool part = has_gradient(s, t) && !s->result->skipped;
    if (part && s->args->add) {
        const array sums = sums_of(t);
        put(s, &sums, offset, n, fo_mean_grad(s, t, offset, at, n, buffer), NULL);
    } else if (part) {
        const double gmax = s->args->clip == FO_CLIP_VALUE ? s->args->clip_limit : INFINITY;
        if (w->coded) {
            update_coded(s, t, w, offset, at, n, gmax);
        } else {
            const void *grad = effective_grad(s, t, w, offset, at, n, buffer);
            const size_t start = (size_t)offset * w->item;
            void *slot[FO_MAX_SLOTS];
            for (int j = 0; j < FO_MAX_SLOTS; j++)
                slot[j] = t->slot[j] ? (char *)t->slot[j] + start : NULL;
            update(w, n, (char *)t->param + start, grad, slot, gmax);
        }
    }
    if (t->ema && !s->result->skipped && !s->args->add)
        average(s, t, offset, n);
    if (t->grad && s->args->zero_grad)
        fo_zero_grad(t, at, n);
}

/* Does a pass over blocks begin to end, in whichever thread. `once` says that it goes over a block
 * only once: what need not stay in cache need not be cut up. */
FO_INLINE void for_blocks(const fo_step *s, int64_t begin, int64_t end, block_pass *pass, bool once)
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
    for_blocks(step_, begin, end, scan_block, false);
}

static void update_blocks(void *step_, int64_t begin, int64_t end)
{
    const fo_step *s = step_;
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
        c->variant = variant;
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
        if (!c->consts || c->step != *t->step || c->fresh != t->fresh) {
            double *consts = plan->consts + (size_t)i * FO_MAX_CONSTS;
            fo_rule_consts(plan->rule, plan->hypers + (size_t)t->group * FO_MAX_HYPERS,
                           s->args->semantics, *t->step + 1, t->fresh, consts);
            c->step = *t->step;
            c->fresh = t->fresh;
            c->consts = consts;
        }
        const double scale = unscale(s, t);
        tensor_work *w = &plan->tensor_works[i];
        const fo_dtype type = arithmetic_of(t);
        w->update = c->update[type];
        w->consts = c->consts;
        w->gscale = c->maximize ? -scale : scale;
        w->item = type == FO_F32 ? sizeof(float) : sizeof(double);
        w->type = (uint8_t)type;
        w->coded = is_coded(t, type);
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
        if (has_gradient(s, p->tensor))
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

/* After a step: counts it, and notes which slots and sums hold something. */
static void advance_counters(const fo_step *s)
{
    fo_tensor *t = s->plan->tensors;
    const bool add = s->args->add;
    const unsigned begins = s->plan->begins;
    for (const fo_tensor *end = t + s->plan->n_tensors; t < end; t++) {
        if (!has_gradient(s, t))
            continue;
        if (!add && begins)
            t->fresh = (*t->step == 0 ? begins : t->fresh) & ~used_slots(s, t);
        if (!add)
            ++*t->step;
        if (t->sum)
            t->has_sum = add;
    }
}

void fo_plan_step(fo_plan *plan, const fo_step_args *args, fo_step_result *result)
{
    fo_step s = {plan, args, result, fo_active_table(), 1 / args->loss_scale};
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
        const bool pool = args->pool && touched >= MIN_FOR_POOL && args->max_threads <= FO_MAX_TEAM;
        choice = fo_tuner_choose(tuner, fo_tuner_last(crew.members), pool);
        crew.members = fo_tuner_threads(choice, crew.members);
        if (choice == TUNER_POOL)
            crew.pool = args->pool;
    }

    const bool scans = norm_needed(args) || args->nonfinite != FO_PROPAGATE;
    const fo_passes passes = {scans ? scan_blocks : NULL, between_passes, update_blocks};
    const int64_t grain = AT_A_TIME * plan->n_blocks / (plan->size + 1) + 1;
    result->threads = fo_share(&crew, plan->n_blocks, grain, &passes, &s);
    if (tuned)
        fo_tuner_learn(tuner, choice, result->threads, fo_seconds() - begin, (double)touched);
    if (!result->skipped)
        advance_counters(&s);
    fo_fpenv_leave(saved);
}
