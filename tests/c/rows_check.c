/* What driver_check does for gradients of all elements, for those of some rows: every rule and row of
 * hyperparameters gives the same bytes under each instruction set and with teams of each kind, as with
 * `base` on one thread; and where rows take steps later that they have missed, the bytes of gradients
 * of all elements. Tables have rows that are shorter and longer than a cache line and a block, and are
 * stored in several ways. Takes driver_check's arguments.
 *
 * Every array ends where its memory block ends, so that a step too far is seen. */
#include "driver.h"

enum { STEPS = 6, ARRAYS = 1 + FO_MAX_SLOTS, BITS8 = 255, MOST_GIVEN = 250, WIDEST = 5000 };

/* Of type `state`, but for slots that are always kept as they are computed. */
static const struct {
    int64_t rows, size;
    uint8_t param, state, grad;
} tables[] = {
    {300, 1, FO_F32, FO_F32, FO_F32},    {60, 3, FO_F64, FO_F64, FO_F64},
    {40, 64, FO_F32, BITS8, FO_F32},     {30, 130, FO_BF16, FO_BF16, FO_BF16},
    {3, WIDEST, FO_F32, FO_F32, FO_F32}, {2, FO_BLOCK, FO_F16_MASTER, FO_F32, FO_F16},
    {5000, 2, FO_F32, FO_F32, FO_F32},   {0, 4, FO_F32, FO_F32, FO_F32},
};
enum { TABLES = COUNT(tables), DENSE_TABLE = 4, LEFT_OUT = 1, REFRESHED = 6 };

static const struct {
    fo_step_args args;
    bool bad; /* in one step, a gradient is not finite */
} options[] = {
    {{.loss_scale = 1}, false},
    {{.loss_scale = 8, .clip = FO_CLIP_VALUE, .clip_limit = 0.25, .zero_grad = true}, false},
    {{.loss_scale = 1, .clip = FO_CLIP_NORM, .clip_limit = 1}, false},
    {{.loss_scale = 8, .clip = FO_GLOBAL_CLIP_NORM, .clip_limit = 1}, false},
    {{.loss_scale = 1, .nonfinite = FO_SKIP, .zero_grad = true}, true},
    {{.loss_scale = 1, .nonfinite = FO_SKIP, .zero_grad = true, .ema_decay = 0.9},
     true}, /* the last, which is for LAZY alone */
};

/* What rows mean that have no gradient, and a run that is given all elements. */
typedef enum { LAZY, EXACT, ALL_ELEMENTS } meaning;

typedef struct {
    char *data, *beside;
    fo_dtype dtype;
} stored;

typedef struct {
    stored arrays[ARRAYS], ema;
    char *grad;
    int64_t step, *indices;
    double number; /* of a rule that keeps one */
    fo_row_log log;
} table;

static size_t beside(fo_dtype dtype, int64_t n)
{
    const fo_storage *storage = &fo_storages[dtype];
    return storage->per ? (size_t)((n + storage->per - 1) / storage->per) * storage->beside : 0;
}

static stored new_array(fo_dtype dtype, int64_t n)
{
    const size_t bytes = (size_t)n * fo_storages[dtype].bytes, more = beside(dtype, n);
    return (stored){checked(calloc(bytes + !bytes, 1)), checked(calloc(more + !more, 1)), dtype};
}

static void append_stored(record *r, const stored *a, int64_t n)
{
    append(r, a->data, (size_t)n * fo_storages[a->dtype].bytes);
    append(r, a->beside, beside(a->dtype, n));
}

/* Writes doubles that floats are, as some type. */
static void write(fo_dtype dtype, int64_t n, void *to, const double *values, void *more)
{
    static float narrow[WIDEST];
    if (dtype == FO_F64) {
        memcpy(to, values, (size_t)n * sizeof *values);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        narrow[i] = (float)values[i];
    fo_encode(dtype, n, to, narrow, more);
}

static fo_dtype type_of(const fo_rule *rule, int i, int array)
{
    if (array == 0)
        return tables[i].param;
    if (tables[i].state == FO_F64)
        return FO_F64;
    if (fo_rule_slot_exact(rule, array - 1))
        return FO_F32;
    if (tables[i].state != BITS8)
        return tables[i].state;
    return fo_rule_slot_unsigned(rule, array - 1) ? FO_8BIT_UNSIGNED : FO_8BIT_SIGNED;
}

static fo_dtype wide_type(int i) { return fo_storages[tables[i].param].arithmetic; }

/* Draws the numbers of rows for a step: in order, in any, or several times. Returns how many. */
static int64_t draw_indices(int i, int s, int64_t *indices)
{
    const int64_t rows = tables[i].rows;
    int64_t n = rows == 0 ? 0 : (int64_t)(random_bits() % (uint64_t)(2 * rows));
    n = n < MOST_GIVEN ? n : MOST_GIVEN;
    if (s == 1)
        n = n < 8 ? n : 8;
    for (int64_t k = 0; k < n; k++) {
        const int64_t any = (int64_t)(random_bits() % (uint64_t)rows);
        const int64_t in_order = k < rows ? k : rows - 1;
        indices[k] = s % 3 == 0 ? in_order : s % 3 == 1 ? any : rows - 1 - any / 3;
    }
    return n;
}

/* Draws the gradient of a step, and gives it to the tensor as it is meant. */
static void draw_gradient(int i, int s, meaning means, bool bad, table *b, fo_tensor *t)
{
    static double drawn[WIDEST], sums[WIDEST * 3];
    static bool seen[5000];
    const int64_t size = tables[i].size, rows = tables[i].rows;
    const bool all = i == DENSE_TABLE && s == 3, wide = wide_type(i) == FO_F64;
    const fo_dtype given = tables[i].grad, summed = wide_type(i);
    const int64_t n = all ? rows : draw_indices(i, s, b->indices);
    const bool sparse = !all && means != ALL_ELEMENTS;
    const fo_dtype dtype = sparse ? given : summed;
    const size_t item = fo_storages[dtype].bytes;
    free(b->grad);
    b->grad = checked(calloc((size_t)((sparse ? n : rows) * size) * item + 1, 1));
    memset(seen, 0, (size_t)rows);
    memset(sums, 0, (size_t)(rows * size) * sizeof *sums);
    for (int64_t k = 0; k < n; k++) {
        const int64_t row = all ? k : b->indices[k];
        char rounded[WIDEST * sizeof(float)];
        for (int64_t e = 0; e < size; e++)
            drawn[e] = (float)random_value(FO_F32);
        if (bad && k == 0)
            drawn[size - 1] = NAN;
        if (sparse) {
            write(given, size, b->grad + (size_t)(k * size) * item, drawn, NULL);
            continue;
        }
        if (given != summed) { /* what is left of it */
            static float left[WIDEST];
            write(given, size, rounded, drawn, NULL);
            fo_decode(given, size, left, rounded, NULL);
            for (int64_t e = 0; e < size; e++)
                drawn[e] = left[e];
        }
        for (int64_t e = 0; e < size; e++) {
            double *sum = &sums[row * size + e];
            const double more = *sum + drawn[e];
            *sum = !seen[row] ? drawn[e] : wide ? more : (float)more;
        }
        seen[row] = true;
    }
    for (int64_t row = 0; row < rows && !sparse; row++)
        write(dtype, size, b->grad + (size_t)(row * size) * item, &sums[row * size], NULL);
    t->grad = i == LEFT_OUT && s == 4 ? NULL : b->grad;
    t->dtype.of.grad = (uint8_t)dtype;
    t->row_size = sparse && t->grad ? size : 0;
    t->indices = b->indices;
    t->n_indices = n;
}

/* The steps of one configuration and option from the same start, always with the same values. */
static void run(const fo_rule *rule, int row, fo_semantics semantics, int option, meaning means,
                bool exact, int team, record *r)
{
    static table bound[TABLES];
    fo_plan *plan = checked(fo_plan_create(rule, 1, TABLES));
    const bool averages = options[option].args.ema_decay != 0;
    int64_t which = 0, at = 0;
    random_state = 88172645463325252u;
    fill_hypers(rule, row, 0, fo_plan_hypers(plan, 0));
    memset(bound, 0, sizeof bound);
    for (int i = 0; i < TABLES; i++) {
        const int64_t size = tables[i].size, n = tables[i].rows * size;
        table *b = &bound[i];
        fo_tensor *t = fo_plan_tensor(plan, i);
        fo_coding *coding = fo_plan_coding(plan, i);
        *t = (fo_tensor){
            .step = &b->step, .size = n, .width = size, .dtype = fo_one_dtype(wide_type(i))};
        *coding = (fo_coding){.seed = 7, .index = i};
        for (int j = 0; j < ARRAYS; j++) {
            stored *a = &b->arrays[j];
            *a = new_array(type_of(rule, i, j), n);
            if (j > 0 && !fo_rule_uses_slot(rule, fo_plan_hypers(plan, 0), j - 1))
                continue;
            if (j > 0 && fo_rule_slot_number(rule, j - 1)) {
                b->number = 1;
                t->slot[j - 1] = &b->number;
                continue;
            }
            *(j == 0 ? &t->param : &t->slot[j - 1]) = a->data;
            *(j == 0 ? &t->dtype.of.param : &t->dtype.of.slot[j - 1]) = (uint8_t)a->dtype;
            coding->beside[j] = a->beside;
            if (a->dtype != FO_F32 && a->dtype != FO_F64 && a->dtype != FO_F16_MASTER)
                coding->stochastic |= FO_SLOT(j);
        }
        b->ema = new_array(wide_type(i), n);
        t->ema = averages ? b->ema.data : NULL;
        b->indices = checked(calloc(MOST_GIVEN, sizeof *b->indices));
        for (int64_t k = 0; k < tables[i].rows; k++) {
            const stored *a = &b->arrays[0];
            double values[WIDEST];
            for (int64_t e = 0; e < size; e++)
                values[e] = (float)random_value(FO_F32);
            write(a->dtype, size, a->data + (size_t)(k * size) * fo_storages[a->dtype].bytes,
                  values, a->beside + beside(a->dtype, k * size));
        }
        if (means == EXACT && n > 0) {
            t->log = &b->log;
            if (!fo_row_log_prepare(&b->log, tables[i].rows))
                checked(NULL);
        }
    }
    r->length = 0;
    for (int s = 0; s < STEPS; s++) {
        fo_step_args args = options[option].args;
        fo_step_result result;
        args.accumulate = 1;
        args.semantics = semantics;
        args.ema_starts = s == 0;
        args.max_threads = team;
        args.exact = exact;
        const bool bad = options[option].bad && s == 2;
        /* The defaults, with which fewer rows miss anything. */
        if (s == STEPS - 1 && !keeps_rows(rule, fo_plan_hypers(plan, 0)))
            fill_hypers(rule, 0, 0, fo_plan_hypers(plan, 0));
        for (int i = 0; i < TABLES; i++) {
            fo_tensor *t = fo_plan_tensor(plan, i);
            draw_gradient(i, s, means, bad && i == 2, &bound[i], t);
            const int64_t some[] = {4999, 0, 7, 7}; /* not in the block between */
            fo_status status = FO_OK;
            if (means == EXACT && i == DENSE_TABLE && s == 3)
                status = fo_plan_refresh(plan, i, NULL, 0, &args, &at);
            else if (means == EXACT && i == REFRESHED && s == 3)
                status = fo_plan_refresh(plan, i, some, COUNT(some), &args, &at);
            expect(status == FO_OK, "refresh", rule);
        }
        const bool taken = fo_plan_take_rows(plan, &which, &at) == FO_OK;
        if (!taken)
            checked(NULL);
        fo_plan_step(plan, &args, &result);
        expect(result.skipped == (bad ? 1 : 0), "skipped", rule);
        expect(exact ? result.threads == team : result.threads <= team, "threads", rule);
        if (result.has_norm)
            append(r, &result.grad_norm, sizeof result.grad_norm);
        for (int i = 0; i < TABLES && means == LAZY; i++) /* zeroed, or as they were */
            append(r, bound[i].grad,
                   (size_t)(fo_plan_tensor(plan, i)->n_indices * tables[i].size) *
                       fo_storages[fo_plan_tensor(plan, i)->dtype.of.grad].bytes);
        if (means != LAZY)
            continue;
        /* A row that does not exist is named, and the plan goes on. */
        fo_tensor *t = fo_plan_tensor(plan, 0);
        const int64_t wrong_row[] = {0, s % 2 ? -1 : tables[0].rows};
        t->indices = wrong_row;
        t->n_indices = COUNT(wrong_row);
        t->row_size = 1;
        expect(fo_plan_take_rows(plan, &which, &at) == FO_BAD_INDEX && which == 0 && at == 1,
               "a row that does not exist", rule);
    }
    for (int i = 0; i < TABLES; i++) {
        const int64_t n = tables[i].rows * tables[i].size;
        const fo_step_args args = {.loss_scale = 1, .max_threads = team, .exact = exact};
        if (fo_plan_refresh(plan, i, NULL, 0, &args, &at) != FO_OK)
            checked(NULL);
        for (int j = 0; j < ARRAYS; j++) {
            append_stored(r, &bound[i].arrays[j], n);
            free(bound[i].arrays[j].data);
            free(bound[i].arrays[j].beside);
        }
        append_stored(r, &bound[i].ema, n);
        append(r, &bound[i].step, sizeof bound[i].step);
        append(r, &bound[i].number, sizeof bound[i].number);
        free(bound[i].ema.data);
        free(bound[i].ema.beside);
        free(bound[i].grad);
        free(bound[i].indices);
        fo_row_log_free(&bound[i].log);
    }
    fo_plan_destroy(plan);
}

int main(int argc, char **argv)
{
    static const char *const layers[] = {"team", "openmp"};
    static const int teams[] = {1, 2, 3, 7};
    int n_layers = fo_layer_available(FO_OPENMP) ? 2 : 1, every = 1;
    const bool compares = !is_given(argc, argv, "digest");
    record lazy = {0}, all = {0}, r = {0};
    unsigned cases = 0, compared = 0;
    if (is_given(argc, argv, "own"))
        n_layers = 1;
    if (is_given(argc, argv, "few"))
        every = FEW;
    fo_init();
    for (int c = 0; c < fo_rule_count * 2 * ROWS; c++) {
        const fo_rule *rule = &fo_rules[c / ROWS / 2];
        const int row = c % ROWS, option = (c / ROWS + c) % COUNT(options);
        double hypers[FO_MAX_HYPERS];
        fill_hypers(rule, row, 0, hypers);
        if (c % every != 0 && !keeps_rows(rule, hypers))
            continue;
        const fo_semantics semantics = c / ROWS % 2 ? FO_KERAS : FO_TORCH;
        const bool averages = options[option].args.ema_decay != 0;
        fo_isa_select("base");
        run(rule, row, semantics, option, LAZY, false, 1, &lazy);
        add_to_digest(&lazy);
        if (!averages) {
            run(rule, row, semantics, option, ALL_ELEMENTS, false, 1, &all);
            add_to_digest(&all);
        }
        for (int isa = 0; isa < fo_isa_count() && compares; isa++)
            for (meaning means = LAZY; means <= (averages ? LAZY : EXACT); means++) {
                const unsigned mixed = cases++ * 2654435761u;
                if (!fo_isa_select(fo_isa_name(isa)))
                    continue;
                fo_layer_select(layers[(mixed >> 28 & 1) % (unsigned)n_layers]);
                compared++;
                run(rule, row, semantics, option, means, mixed >> 31, teams[mixed >> 29 & 3], &r);
                expect(same(&r, means == LAZY ? &lazy : &all), fo_isa_name(isa), rule);
            }
    }
    free(lazy.bytes);
    free(all.bytes);
    free(r.bytes);
    printf("%u cases of rows, %d differences\n", compared, wrong);
    printf("digest %016" PRIx64 "\n", digest);
    return wrong != 0;
}
