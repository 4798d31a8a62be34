/* A step, block by block: the norm of a block's gradient, and its update. A block has all of its elements
 * in the gradient, or some rows of them. */
#include "update.h"
#include "platform.h"
#include "random.h"
#include "rule.h"
#include <math.h>
#include <string.h>

#define CACHE_LINE 64    /* bytes */
#define MIN_TO_ALIGN 256 /* elements */
#define MAX_FETCHED 256  /* elements of a row, of each array; the processor foresees the others */
#define ROWS_AHEAD 4

/* ---- all elements of a block ----------------------------------------------------------------- */

/* Adds the sums up, always in the same order. */
static double fold(double *sum)
{
    for (int half = FO_LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            sum[j] += sum[j + half];
    return sum[0];
}

void fo_scan_block(const fo_step *s, const piece *p, int64_t block, int64_t offset, int64_t n,
                   char *buffer)
{
    const fo_tensor *t = p->tensor;
    const tensor_work *w = p->work;
    const int64_t at = offset + p->to_grad;
    if (!has_gradient(s, t))
        return;
    const void *grad = effective_grad(s, t, w, offset, at, n, buffer);
    const double scale = unscale(s, t);
    double sums[FO_LANES] = {0};
    s->table->add_squares[w->type](n, grad, scale, 0, sums);
    const double sum = fold(sums);
    s->plan->block_sum[block] = sum;
    /* A finite sum has finite terms; one that is not may have overflowed. */
    s->plan->block_finite[block] = sum - sum == 0 || s->table->all_finite[w->type](n, grad, scale);
}

/* Calls a loop: at first for what comes before a cache line, so that no vector of the parameter lies
 * in two cache lines; nor do those of the other arrays, if they begin at the same place in a line. */
static void update(const tensor_work *w, int64_t n, char *param, const char *grad, void **slot)
{
    const size_t item = w->item;
    const int64_t head =
        n < MIN_TO_ALIGN ? 0 : (int64_t)((-(uintptr_t)param & (CACHE_LINE - 1)) / item);
    if (head > 0) {
        w->update(head, param, grad, slot, w->consts, w->gscale, w->gmax);
        for (int j = 0; j < FO_MAX_SLOTS; j++)
            slot[j] = slot[j] ? (char *)slot[j] + (size_t)head * item : NULL;
    }
    w->update(n - head, param + (size_t)head * item, grad + (size_t)head * item, slot, w->consts,
              w->gscale, w->gmax);
}

/* A tensor's arrays: 0 is the parameter, 1 + j is slot j. */
static array array_of(const fo_tensor *t, const fo_coding *coding, int number)
{
    if (number == 0)
        return (array){t->dtype.of.param, t->param, coding->beside[0]};
    return (array){t->dtype.of.slot[number - 1], t->slot[number - 1], coding->beside[number]};
}

/* The loop that is made for what is stored as it is here, or NULL. */
static fo_fused *find_fused(const fo_step *s, const fo_tensor *t, const tensor_work *w)
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
            if (w->slots & FO_SLOT(j))
                same = t->dtype.of.slot[j] == (needs[j] & EXACT ? FO_F32 : types[k][2]);
        }
        if (same)
            return s->table->fused[s->plan->rule - fo_rules][k][w->variant];
    }
    return NULL;
}

/* How many elements, an even number, come before a cache line of the array that has the most bytes:
 * none of its vectors then lies in two, and few of the others' do. */
static int64_t before_line(const fo_tensor *t, const fo_coding *coding, unsigned slots,
                           int64_t offset)
{
    array widest = array_of(t, coding, 0);
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
                            int64_t offset, int64_t at, int64_t n, uint64_t key)
{
    const unsigned slots = w->slots;
    const fo_coding *coding = w->coding;
    const int64_t element = coding->first + offset, upper = element >> 32;
    const int64_t left = ((upper + 1) << 32) - element; /* that have the upper half in common */
    fo_fused *const fused = find_fused(s, t, w);
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
    const int64_t head = n < MIN_TO_ALIGN ? 0 : before_line(t, coding, slots, offset);
    n = head > 0 ? head : n;
    const fo_stored grad = {(char *)t->grad + (size_t)at * fo_storages[t->dtype.of.grad].bytes,
                            NULL};
    fused(n, stored, &grad, stochastic != 0, fo_key(key, upper), (uint32_t)element, w->consts,
          w->gscale, w->gmax);
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
                           int64_t offset, int64_t at, int64_t n)
{
    _Alignas(64) char buffers[2 + FO_MAX_SLOTS][FO_STRETCH * sizeof(double)];
    _Alignas(64) uint16_t random[1 + FO_MAX_SLOTS][FO_STRETCH];
    const fo_coding *coding = w->coding;
    const unsigned slots = w->slots;
    const array grads = {t->dtype.of.grad, t->grad, NULL};
    const int64_t end = offset + n;
    uint64_t key = fo_mix64(coding->seed + FO_GOLDEN);
    key = fo_key(fo_key(key, w->step), coding->index);

    for (int64_t done = 1; done > 0; offset += done, at += done)
        done = offset < end ? update_fused(s, t, w, offset, at, end - offset, key) : 0;
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
        w->update(m, elements[0], grad, elements + 1, w->consts, w->gscale, w->gmax);
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

FO_APART void average(const fo_step *s, const fo_tensor *t, const fo_coding *coding, int64_t offset,
                      int64_t n)
{
    _Alignas(64) char buffers[2][FO_STRETCH * sizeof(double)];
    const fo_dtype type = arithmetic_of(t);
    const int64_t most = is_coded(t, type) ? FO_STRETCH : n;
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

/* Where elements of the parameter are from `offset` on, and those of its slots; none of these is stored
 * in another type. */
static char *find_elements(const fo_tensor *t, const tensor_work *w, int64_t offset, void **slot)
{
    const size_t start = (size_t)offset * w->item;
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        slot[j] = t->slot[j] ? (char *)t->slot[j] + start : NULL;
    return (char *)t->param + start;
}

/* Updates n elements from `offset` on, whose gradient is from `at` on. */
static void update_elements(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                            int64_t offset, int64_t at, int64_t n, char *buffer)
{
    if (w->coded) {
        update_coded(s, t, w, offset, at, n);
        return;
    }
    const void *grad = effective_grad(s, t, w, offset, at, n, buffer);
    void *slot[FO_MAX_SLOTS];
    update(w, n, find_elements(t, w, offset, slot), grad, slot);
}

void fo_update_block(const fo_step *s, const piece *p, int64_t block, int64_t offset, int64_t n,
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
        update_elements(s, t, w, offset, at, n, buffer);
    }
    if (t->ema && !s->result->skipped && !s->args->add)
        average(s, t, w->coding, offset, n);
    if (t->grad && s->args->zero_grad)
        fo_zero_grad(t, at, n);
}

/* ---- steps that rows have missed --------------------------------------------------------------- */

static const double zeros[FO_BLOCK]; /* their gradient, in either type */

static bool is_zero(const array *a, int64_t offset, int64_t n)
{
    static const char none[FO_BLOCK * sizeof(double)];
    const fo_storage *storage = &fo_storages[a->dtype];
    const char *at = (const char *)a->data + (size_t)offset * storage->bytes;
    return memcmp(at, none, (size_t)n * storage->bytes) == 0;
}

/* Takes the steps from number j on, in n elements. */
static void take_missed(const fo_step *s, const fo_tensor *t, const tensor_work *w, int64_t j,
                        int64_t begin, int64_t n)
{
    fo_update *const *const updates = s->table->update[w->type][s->plan->rule - fo_rules];
    void *slot[FO_MAX_SLOTS];
    char *const param = find_elements(t, w, begin, slot);
    for (; j < t->log->n; j++) {
        const fo_missed *m = &t->log->steps[j % FO_ROW_LOG];
        updates[m->variant](n, param, zeros, slot, m->consts, m->gscale, m->gmax);
    }
}

/* The same where something is stored in another type: it is stored again after each step. */
FO_APART void take_missed_coded(const fo_step *s, const fo_tensor *t, const tensor_work *now,
                                int64_t j, int64_t begin, int64_t n)
{
    tensor_work w = *now;
    fo_tensor missed = *t;
    missed.grad = (void *)zeros;
    missed.grad_ndim = 0;
    missed.dtype.of.grad = w.type;
    for (; j < t->log->n; j++) {
        const fo_missed *m = &t->log->steps[j % FO_ROW_LOG];
        w.update = s->table->update[w.type][s->plan->rule - fo_rules][m->variant];
        w.variant = (uint8_t)m->variant;
        w.slots = (uint8_t)slots_of(s->plan->rule, m->variant);
        w.consts = m->consts;
        w.gscale = m->gscale;
        w.gmax = m->gmax;
        w.step = m->step;
        update_coded(s, &missed, &w, begin, 0, n);
    }
}

void fo_catch_up(const fo_step *s, const fo_tensor *t, const tensor_work *now, int64_t row,
                 int64_t begin, int64_t end)
{
    const fo_row_log *log = t->log;
    const int64_t size = t->size / log->n_rows;
    const uint16_t behind = (uint16_t)((uint16_t)log->n - log->taken[row]);
    begin = begin > row * size ? begin : row * size;
    end = end < (row + 1) * size ? end : (row + 1) * size;
    if (behind == 0)
        return;
    const int64_t n = end - begin;
    bool at_zero = true; /* all slots, so far */
    for (int j = 0; j < FO_MAX_SLOTS && at_zero; j++) {
        const array a = array_of(t, now->coding, 1 + j);
        at_zero = !a.data || is_zero(&a, begin, n);
    }
    int64_t j = log->n - behind;
    while (j < log->n && at_zero && log->steps[j % FO_ROW_LOG].rests)
        j++;
    if (now->coded)
        take_missed_coded(s, t, now, j, begin, n);
    else
        take_missed(s, t, now, j, begin, n);
}

/* ---- the rows of a block that have a gradient ------------------------------------------------- */

/* Elements of one row; or of several that follow one another, in the parameter and as given. */
typedef struct {
    int64_t k, next;        /* distinct rows, from k on to before `next` */
    int64_t begin, end, at; /* elements, and where their gradient is given first */
} run;

/* Finds the run of row k within elements from `from` to `to`. */
static run find_run(const fo_rows *rows, int64_t k, int64_t from, int64_t to)
{
    const int64_t size = rows->row_size, *first = rows->first;
    const fo_row *given = &rows->sorted[first[k]];
    const int64_t start = given->row * size;
    run r = {k, k + 1, start > from ? start : from, start + size, 0};
    r.at = given->at * size + (r.begin - start);
    while (r.end < to && r.next < rows->n_distinct && first[r.next] - first[r.next - 1] == 1 &&
           first[r.next + 1] - first[r.next] == 1 && given[1].row == given->row + 1 &&
           given[1].at == given->at + 1) {
        given++;
        r.next++;
        r.end += size;
    }
    r.end = r.end < to ? r.end : to;
    return r;
}

/* A run's gradient; of a row that is given more than once, the sum in the order given. */
static const void *run_grad(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                            const fo_rows *rows, const run *r, char *buffer)
{
    _Alignas(64) char more[FO_STRETCH * sizeof(double)];
    const int64_t n = r->end - r->begin;
    const void *grad = effective_grad(s, t, w, r->begin, r->at, n, buffer);
    const fo_row *given = &rows->sorted[rows->first[r->k]];
    const fo_row *const end = &rows->sorted[rows->first[r->k + 1]];
    if (end - given == 1)
        return grad;
    if (grad != buffer)
        memcpy(buffer, grad, (size_t)n * w->item);
    for (const int64_t first = given->at; ++given < end;) {
        const int64_t at = r->at + (given->at - first) * rows->row_size;
        for (int64_t i = 0; i < n; i += FO_STRETCH) {
            const int64_t m = n - i < FO_STRETCH ? n - i : FO_STRETCH;
            s->table->add[w->type](m, buffer + (size_t)i * w->item,
                                   effective_grad(s, t, w, r->begin + i, at + i, m, more));
        }
    }
    return buffer;
}

/* Its elements are those from `begin` to `end`; its sum is that of all of them, zero but in these
 * rows. */
void fo_scan_rows(const fo_step *s, const piece *p, int64_t block, int64_t begin, int64_t end,
                  int64_t k, char *buffer)
{
    const fo_tensor *t = p->tensor;
    const tensor_work *w = p->work;
    const fo_rows *rows = w->rows;
    const double scale = unscale(s, t);
    double sums[FO_LANES] = {0};
    bool finite = true;
    for (run r; k < rows->n_distinct && fo_distinct_row(rows, k) * rows->row_size < end;
         k = r.next) {
        r = find_run(rows, k, begin, end);
        const void *grad = run_grad(s, t, w, rows, &r, buffer);
        const int64_t n = r.end - r.begin;
        s->table->add_squares[w->type](n, grad, scale, (r.begin - begin) % FO_LANES, sums);
        finite = finite && s->table->all_finite[w->type](n, grad, scale);
    }
    s->plan->block_sum[block] = fold(sums);
    s->plan->block_finite[block] = finite;
}

/* Has the processor fetch a row, which it cannot foresee. */
FO_INLINE void fetch_row(const fo_tensor *t, const tensor_work *w, const fo_rows *rows, int64_t k)
{
    const fo_row *given = &rows->sorted[rows->first[k]];
    const int64_t size = rows->row_size, n = size < MAX_FETCHED ? size : MAX_FETCHED;
    const array grads = {t->dtype.of.grad, t->grad, NULL};
    fetch(&grads, given->at * size, n);
    for (int j = 0; j <= FO_MAX_SLOTS; j++) {
        const array a = array_of(t, w->coding, j);
        if (j == 0 || w->slots & FO_SLOT(j - 1))
            fetch(&a, given->row * size, n);
    }
}

static void zero_rows(const fo_tensor *t, const fo_rows *rows, const run *r)
{
    const int64_t first = rows->sorted[rows->first[r->k]].at;
    if (r->next - r->k > 1) {
        fo_zero_grad(t, r->at, r->end - r->begin);
        return;
    }
    for (int64_t i = rows->first[r->k]; i < rows->first[r->next]; i++)
        fo_zero_grad(t, r->at + (rows->sorted[i].at - first) * rows->row_size, r->end - r->begin);
}

static void update_run(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                       const fo_rows *rows, const run *r, char *buffer)
{
    const int64_t n = r->end - r->begin;
    if (t->log && t->log->n != t->log->current)
        for (int64_t k = r->k; k < r->next; k++)
            fo_catch_up(s, t, w, fo_distinct_row(rows, k), r->begin, r->end);
    if (rows->first[r->next] - rows->first[r->k] == r->next - r->k) {
        update_elements(s, t, w, r->begin, r->at, n, buffer);
        return;
    }
    fo_tensor summed = *t; /* whose gradient is in the buffer */
    summed.dtype.of.grad = w->type;
    summed.grad = (void *)run_grad(s, t, w, rows, r, buffer);
    update_elements(s, &summed, w, r->begin, 0, n, buffer);
}

void fo_update_rows(const fo_step *s, const piece *p, int64_t block, int64_t begin, int64_t end,
                    int64_t k, char *buffer)
{
    const fo_tensor *t = p->tensor;
    const tensor_work *w = p->work;
    const fo_rows *rows = w->rows;
    (void)block;
    for (run r; k < rows->n_distinct && fo_distinct_row(rows, k) * rows->row_size < end;
         k = r.next) {
        r = find_run(rows, k, begin, end);
        for (int64_t ahead = k; ahead < r.next; ahead++)
            if (ahead + ROWS_AHEAD < rows->n_distinct)
                fetch_row(t, w, rows, ahead + ROWS_AHEAD);
        if (!s->result->skipped)
            update_run(s, t, w, rows, &r, buffer);
        if (s->args->zero_grad)
            zero_rows(t, rows, &r);
    }
    if (t->ema && !s->result->skipped)
        average(s, t, w->coding, begin, end - begin);
}
