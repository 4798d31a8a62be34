/* The stable interface, fastopt.h, over plans. Here is what a plan leaves to its caller: every
 * argument that can be checked is, before anything changes, and a failed call says why. */
#include "arrays.h"
#include "core.h"
#include "errors.h"
#include "options.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct fo_optimizer {
    fo_plan *plan;
    fo_tensor *tensors; /* the plan's */
    const fo_rule *rule;
    int32_t n_groups;
    int64_t n_params;
    unsigned *needs;     /* of each group: bit j, whether its steps touch slot j */
    fo_step_args args;   /* but for max_threads, if that is 0 */
    int32_t accumulated; /* steps that the sums are of */
    bool prepared;       /* the plan, for the sizes that the parameters have */
};

#define MAX_ELEMENTS (INT64_C(1) << 48) /* of an array: more than there are addresses for */

/* ---- life ----------------------------------------------------------------------------------- */

static void note_needs(fo_optimizer *opt, int32_t group)
{
    const double *hypers = fo_plan_hypers(opt->plan, group);
    opt->needs[group] = 0;
    for (int j = 0; opt->rule->slot_names[j]; j++)
        if (fo_rule_uses_slot(opt->rule, hypers, j))
            opt->needs[group] |= 1u << j;
}

static void destroy(fo_optimizer *opt)
{
    if (!opt)
        return;
    fo_plan_destroy(opt->plan);
    free(opt->needs);
    free(opt);
}

static fo_status create(const char *name, int32_t n_groups, int64_t n_params, fo_optimizer **made)
{
    if (!made)
        return null_pointer("opt");
    *made = NULL;
    if (!name)
        return null_pointer("rule");
    const fo_rule *rule = fo_find_rule(name);
    if (!rule)
        return fail(FO_BAD_NAME, "there is no rule '%.40s'", name);
    if (n_groups < 1)
        return fail(FO_BAD_VALUE, "n_groups must be 1 at least, got %lld", (long long)n_groups);
    if (n_params < 0 || n_params > INT32_MAX)
        return fail(FO_BAD_VALUE, "n_params must be between 0 and 2**31 - 1, got %lld",
                    (long long)n_params);
    fo_optimizer *opt = calloc(1, sizeof *opt);
    if (opt) {
        opt->rule = rule;
        opt->n_groups = n_groups;
        opt->n_params = n_params;
        opt->args.loss_scale = 1;
        opt->args.accumulate = 1;
        opt->plan = fo_plan_create(rule, n_groups, n_params);
        opt->needs = calloc((size_t)n_groups, sizeof *opt->needs);
    }
    if (!opt || !opt->plan || !opt->needs) {
        destroy(opt);
        return fail(FO_NO_MEMORY, "out of memory for %lld parameters", (long long)n_params);
    }
    for (int32_t g = 0; g < n_groups; g++) {
        for (int j = 0; rule->hyper_names[j]; j++)
            fo_plan_hypers(opt->plan, g)[j] = rule->defaults[j];
        note_needs(opt, g);
    }
    opt->tensors = fo_plan_tensor(opt->plan, 0);
    *made = opt;
    return FO_OK;
}

/* ---- hyperparameters and options ------------------------------------------------------------- */

static fo_status check_group(const fo_optimizer *opt, int32_t group)
{
    if (group < 0 || group >= opt->n_groups)
        return fail(FO_BAD_INDEX, "there is no group %lld: there are %lld", (long long)group,
                    (long long)opt->n_groups);
    return FO_OK;
}

/* Finds the place of a hyperparameter or of a state array (`names` are the rule's of either). */
static fo_status find(const fo_optimizer *opt, const char *what, const char *const *names,
                      const char *name, int *place)
{
    if (!name)
        return null_pointer("name");
    *place = fo_place_of(names, name);
    return *place < 0 ? bad_name(opt->rule, what, names, name) : FO_OK;
}

static fo_status find_hyper(const fo_optimizer *opt, int32_t group, const char *name, int *place)
{
    const fo_status status = check_group(opt, group);
    return status ? status : find(opt, "hyperparameter", opt->rule->hyper_names, name, place);
}

static fo_status out_of_range(const fo_rule *rule, int j, double value)
{
    const char *name = rule->hyper_names[j];
    const double low = rule->lows[j], high = rule->highs[j];
    if (high != high || low == -INFINITY)
        return fail(FO_BAD_VALUE, "%s must be %s, got %g", name,
                    high != high ? "0 or 1" : "a number", value);
    /* The range includes both ends; one that is next to a whole number stands for all that lie on the
     * other side of that. */
    const char *above = low > floor(low) ? ">" : ">=", *below = high < ceil(high) ? "<" : "<=";
    if (high == INFINITY)
        return fail(FO_BAD_VALUE, "%s must be %s %g, got %g", name, above, floor(low), value);
    return fail(FO_BAD_VALUE, "%s must be %s %g and %s %g, got %g", name, above, floor(low), below,
                ceil(high), value);
}

static fo_status set_hyper(fo_optimizer *opt, int32_t group, const char *name, double value)
{
    int j = 0;
    if (!opt)
        return null_pointer("opt");
    const fo_status status = find_hyper(opt, group, name, &j);
    if (status)
        return status;
    if (!fo_rule_takes(opt->rule, j, value))
        return out_of_range(opt->rule, j, value);
    fo_plan_hypers(opt->plan, group)[j] = value;
    note_needs(opt, group);
    return FO_OK;
}

static fo_status get_hyper(const fo_optimizer *opt, int32_t group, const char *name, double *value)
{
    int j = 0;
    if (!opt || !value)
        return null_pointer(opt ? "value" : "opt");
    const fo_status status = find_hyper(opt, group, name, &j);
    if (!status)
        *value = fo_plan_hypers(opt->plan, group)[j];
    return status;
}

static fo_status uses_state(const fo_optimizer *opt, int32_t group, const char *name, int32_t *uses)
{
    int place = 0;
    if (!opt || !uses)
        return null_pointer(opt ? "uses" : "opt");
    fo_status status = check_group(opt, group);
    if (!status)
        status = find(opt, "state", opt->rule->slot_names, name, &place);
    if (!status)
        *uses = opt->needs[group] >> place & 1;
    return status;
}

static fo_status set_options(fo_optimizer *opt, const fo_options *given)
{
    static const fo_options defaults = {.size = sizeof defaults};
    const fo_options *o = given ? given : &defaults;
    if (!opt)
        return null_pointer("opt");
    const fo_status status = check_options(o);
    if (!status)
        opt->args = step_args(o);
    return status;
}

/* ---- arrays --------------------------------------------------------------------------------- */

static fo_status check_param(const fo_optimizer *opt, int64_t i)
{
    if (!opt)
        return null_pointer("opt");
    if (i < 0 || i >= opt->n_params)
        return fail(FO_BAD_INDEX, "there is no parameter %lld: there are %lld", (long long)i,
                    (long long)opt->n_params);
    return FO_OK;
}

/* The parameter, if it exists and is set. */
static fo_status find_param(const fo_optimizer *opt, int64_t i, fo_tensor **tensor)
{
    const fo_status status = check_param(opt, i);
    if (status)
        return status;
    *tensor = &opt->tensors[i];
    if (!(*tensor)->step)
        return fail(FO_INCOMPLETE, "parameter %lld is not set yet", (long long)i);
    return FO_OK;
}

/* The type that a parameter's rule computes in. */
static fo_dtype arithmetic_of(const fo_tensor *t)
{
    return fo_storages[t->dtype.of.param].arithmetic;
}

/* Notes whether array `number` of a parameter is rounded at random. NULL is none. */
static void note_rounding(fo_optimizer *opt, int64_t i, int number, const fo_array *array)
{
    fo_coding *coding = fo_plan_coding(opt->plan, i);
    coding->stochastic &= ~FO_SLOT(number);
    if (array && array->rounding == FO_STOCHASTIC)
        coding->stochastic |= FO_SLOT(number);
}

/* A parameter as it is stored, its master included. */
static fo_dtype stored_type(const fo_array *param)
{
    if (!param->master)
        return param->dtype;
    return param->dtype == FO_BF16 ? FO_BF16_SPLIT : FO_F16_MASTER;
}

static fo_status set_param(fo_optimizer *opt, int64_t i, int32_t group, int64_t size,
                           const fo_array *param, int64_t *step)
{
    fo_status status = check_param(opt, i);
    if (!status)
        status = check_group(opt, group);
    if (!status && !param)
        status = null_pointer("param");
    if (!status) {
        const fo_dtype usual = param->dtype == FO_F64 ? FO_F64 : FO_F32;
        status = check_array("param", param, usual, NULL, NULL, PARAM);
    }
    if (status)
        return status;
    if (size < 0 || size > MAX_ELEMENTS)
        return fail(FO_BAD_VALUE, "size must be between 0 and 2**48, got %lld", (long long)size);
    if (!param->data && size > 0)
        return null_pointer("data of param");
    if (!step)
        return null_pointer("step");
    opt->tensors[i] = (fo_tensor){.param = param->data,
                                  .step = step,
                                  .size = size,
                                  .dtype = fo_one_dtype(fo_storages[param->dtype].arithmetic),
                                  .group = group};
    opt->tensors[i].dtype.of.param = (uint8_t)stored_type(param);
    opt->tensors[i].dtype.of.grad = (uint8_t)param->dtype;
    *fo_plan_coding(opt->plan, i) =
        (fo_coding){.beside = {param->master}, .seed = param->seed, .index = i};
    note_rounding(opt, i, 0, param);
    opt->prepared = false;
    return FO_OK;
}

/* Has a tensor keep an array, or none. */
static void take(const fo_tensor *t, const fo_array *array, void **data, uint8_t *dtype)
{
    *data = array ? array->data : NULL;
    *dtype = (uint8_t)(array ? array->dtype : arithmetic_of(t));
}

static fo_status set_state(fo_optimizer *opt, int64_t i, const char *name, const fo_array *state)
{
    fo_tensor *t = NULL;
    int j = 0;
    fo_status status = find_param(opt, i, &t);
    if (!status)
        status = find(opt, "state", opt->rule->slot_names, name, &j);
    const bool by_row = !status && fo_rule_slot_by_row(opt->rule, j);
    const bool number = !status && fo_rule_slot_number(opt->rule, j);
    if (!status && state) {
        const fo_dtype usual = by_row ? -1 : number ? FO_F64 : arithmetic_of(t);
        status = check_array(name, state, usual, opt->rule, t, j);
    }
    if (status)
        return status;
    if (by_row)
        t->width = state ? state->row_size : 0;
    take(t, state, &t->slot[j], &t->dtype.of.slot[j]);
    if (number)
        t->dtype.of.slot[j] = (uint8_t)arithmetic_of(t);
    fo_plan_coding(opt->plan, i)->beside[1 + j] = state ? state->scales : NULL;
    note_rounding(opt, i, 1 + j, state);
    return FO_OK;
}

/* Checks an average or a sum; NULL is none. */
static fo_status find_for(const fo_optimizer *opt, int64_t i, const char *name,
                          const fo_array *array, fo_tensor **tensor)
{
    const fo_status status = find_param(opt, i, tensor);
    if (status || !array)
        return status;
    return check_array(name, array, arithmetic_of(*tensor), NULL, *tensor, KEPT);
}

static fo_status set_average(fo_optimizer *opt, int64_t i, const fo_array *average)
{
    fo_tensor *t = NULL;
    const fo_status status = find_for(opt, i, "average", average, &t);
    if (!status)
        take(t, average, &t->ema, &t->dtype.of.ema);
    return status;
}

static fo_status set_sum(fo_optimizer *opt, int64_t i, const fo_array *sum, int32_t holds)
{
    fo_tensor *t = NULL;
    fo_status status = find_for(opt, i, "sum", sum, &t);
    if (!status)
        status = check_between("holds", holds, 0, sum && sum->data ? 1 : 0);
    if (!status) {
        take(t, sum, &t->sum, &t->dtype.of.sum);
        t->has_sum = holds != 0;
    }
    return status;
}

static fo_status set_grad(fo_optimizer *opt, int64_t i, const fo_array *grad)
{
    fo_tensor *t = NULL;
    fo_status status = find_param(opt, i, &t);
    /* One of the type that the gradient before had is right again, if it is plain. */
    if (!status && grad)
        status = check_array("grad", grad, t->dtype.of.grad, NULL, t, GRAD);
    if (!status) {
        t->grad = grad ? grad->data : NULL;
        t->row_size = grad ? grad->row_size : 0;
        if (grad) {
            t->dtype.of.grad = (uint8_t)grad->dtype;
            t->indices = grad->rows;
            t->n_indices = grad->n_rows;
        }
    }
    return status;
}

static fo_status set_accumulated(fo_optimizer *opt, int32_t steps)
{
    if (!opt)
        return null_pointer("opt");
    const fo_status status = check_between("steps", steps, 0, INT32_MAX);
    if (!status)
        opt->accumulated = steps;
    return status;
}

/* Finds a parameter, and which of its state arrays has a beginning that a step has to know of. */
static fo_status find_beginning(const fo_optimizer *opt, int64_t i, const char *name,
                                fo_tensor **tensor, unsigned *slot)
{
    int place = 0;
    fo_status status = find_param(opt, i, tensor);
    if (!status)
        status = find(opt, "state", opt->rule->slot_names, name, &place);
    if (status)
        return status;
    if (!fo_rule_slot_begins(opt->rule, place))
        return fail(FO_BAD_NAME, "%s does not ask whether %s has begun", opt->rule->name, name);
    *slot = FO_SLOT(place);
    return FO_OK;
}

static fo_status set_begun(fo_optimizer *opt, int64_t i, const char *name, int32_t begun)
{
    fo_tensor *tensor = NULL;
    unsigned slot = 0;
    fo_status status = find_beginning(opt, i, name, &tensor, &slot);
    if (!status)
        status = check_between("begun", begun, 0, 1);
    if (!status)
        tensor->fresh = begun ? tensor->fresh & ~slot : tensor->fresh | slot;
    return status;
}

static fo_status get_begun(const fo_optimizer *opt, int64_t i, const char *name, int32_t *begun)
{
    fo_tensor *tensor = NULL;
    unsigned slot = 0;
    const fo_status status = find_beginning(opt, i, name, &tensor, &slot);
    if (status)
        return status;
    if (!begun)
        return null_pointer("begun");
    *begun = *tensor->step > 0 && !(tensor->fresh & slot);
    return FO_OK;
}

/* ---- the step -------------------------------------------------------------------------------- */

static int32_t get_num_threads(void) { return fo_get_num_threads(); }

static fo_status set_num_threads(int32_t n)
{
    const fo_status status = check_between("n", n, 1, FO_MAX_THREADS);
    if (!status)
        fo_set_num_threads(n);
    return status;
}

static fo_status set_threading_layer(const char *name)
{
    char there[64] = "";
    if (!name)
        return null_pointer("name");
    if (fo_layer_select(name))
        return FO_OK;
    for (int i = 0; i < FO_LAYERS; i++)
        if (fo_layer_available((fo_layer)i))
            enlist(there, sizeof there, ", ", fo_layer_name((fo_layer)i));
    return fail(FO_BAD_NAME, "there is no threading layer '%s' here; choose one of %s", name,
                there);
}

static const char *get_threading_layer(void) { return fo_layer_name(fo_layer_active()); }

/* Checks whether steps of a parameter go with a gradient of some rows. */
static fo_status check_rows_allowed(const fo_optimizer *opt, int64_t i)
{
    const fo_tensor *t = &opt->tensors[i];
    if (opt->args.accumulate > 1 || t->sum)
        return fail(FO_UNSUPPORTED,
                    "the gradient of parameter %lld is of some rows, which does not go with %s",
                    (long long)i, t->sum ? "a sum" : "'accumulate'");
    if (fo_has_scales(t) && t->row_size % FO_SCALED != 0)
        return fail(FO_UNSUPPORTED,
                    "the gradient of parameter %lld is of some rows, of %lld elements: beside "
                    "8-bit state a row must have a multiple of %d",
                    (long long)i, (long long)t->row_size, FO_SCALED);
    if (t->width != 0 && t->width != t->row_size)
        return fail(
            FO_BAD_VALUE,
            "the gradient of parameter %lld is of some rows, of %lld elements, and there is "
            "state of one value for each row, of %lld elements",
            (long long)i, (long long)t->row_size, (long long)t->width);
    return FO_OK;
}

/* Sorts the rows that gradients are of, if there are any. */
static fo_status take_rows(fo_optimizer *opt)
{
    int64_t i = 0, at = 0;
    opt->prepared = false;
    const fo_status status = fo_plan_take_rows(opt->plan, &i, &at);
    const fo_tensor *t = &opt->tensors[i];
    if (status == FO_BAD_INDEX)
        return fail(FO_BAD_INDEX,
                    "rows[%lld] of the gradient of parameter %lld must be between 0 and %lld, got "
                    "%lld",
                    (long long)at, (long long)i, (long long)(t->size / t->row_size) - 1,
                    (long long)t->indices[at]);
    return status ? fail(FO_NO_MEMORY, "out of memory") : FO_OK;
}

static fo_status check_complete(const fo_optimizer *opt, bool *by_rows)
{
    const bool accumulates = opt->args.accumulate > 1;
    for (int64_t i = 0; i < opt->n_params; i++) {
        fo_tensor *t = NULL;
        const fo_status status = find_param(opt, i, &t);
        if (status)
            return status;
        if (*t->step < 0 || *t->step == INT64_MAX)
            return fail(FO_BAD_VALUE,
                        "the number of steps of parameter %lld must be >= 0 and < 2**63 - 1, got "
                        "%lld",
                        (long long)i, (long long)*t->step);
        *by_rows = *by_rows || t->row_size != 0;
        const fo_status fits = t->row_size != 0 ? check_rows_allowed(opt, i) : FO_OK;
        if (fits)
            return fits;
        if (accumulates && t->grad && !t->sum && t->size > 0)
            return fail(FO_INCOMPLETE, "parameter %lld lacks its sum", (long long)i);
        for (int j = 0; j < FO_MAX_SLOTS; j++)
            if ((t->grad || t->row_size || t->has_sum) && !t->slot[j] &&
                opt->needs[t->group] >> j & 1 && (t->size > 0 || fo_rule_slot_number(opt->rule, j)))
                return fail(FO_INCOMPLETE, "parameter %lld lacks its state '%s'", (long long)i,
                            opt->rule->slot_names[j]);
    }
    return FO_OK;
}

static fo_status step(fo_optimizer *opt, fo_result *result)
{
    fo_step_result done;
    if (!opt)
        return null_pointer("opt");
    fo_status status = result ? check_size("fo_result", result->size, sizeof *result) : FO_OK;
    bool by_rows = false;
    if (!status)
        status = check_complete(opt, &by_rows);
    if (!status && by_rows)
        status = take_rows(opt);
    if (status)
        return status;
    if (!by_rows && !opt->prepared && fo_plan_prepare(opt->plan) != FO_OK)
        return fail(FO_NO_MEMORY, "out of memory");
    opt->prepared = !by_rows;

    fo_step_args args = opt->args;
    if (args.max_threads == 0)
        args.max_threads = fo_get_num_threads();
    args.add = opt->accumulated + 1 < args.accumulate;
    fo_plan_step(opt->plan, &args, &done);
    if (!done.skipped)
        opt->accumulated = args.add ? opt->accumulated + 1 : 0;
    if (result)
        *result = (fo_result){
            .size = sizeof *result,
            .threads = done.threads,
            .has_norm = done.has_norm,
            .skipped = done.skipped,
            .accumulated = opt->accumulated,
            .nonfinite_param = done.skipped ? done.first_skipped : -1,
            .grad_norm = done.has_norm ? done.grad_norm : 0,
        };
    if (done.skipped && args.nonfinite == FO_RAISE)
        return fail(FO_NONFINITE,
                    "the gradient of parameter %lld holds a NaN or an infinity; nothing was "
                    "updated",
                    (long long)done.first_skipped);
    return FO_OK;
}

/* ---- the table ------------------------------------------------------------------------------- */

const fo_api *fo_get_api(void)
{
    static const fo_api table = {
        .abi = FO_ABI,
        .size = sizeof table,
        .last_error = last_error,
        .rule_name = fo_rule_name,
        .hyper_name = fo_hyper_name,
        .state_name = fo_state_name,
        .create = create,
        .destroy = destroy,
        .set_hyper = set_hyper,
        .get_hyper = get_hyper,
        .uses_state = uses_state,
        .set_options = set_options,
        .set_param = set_param,
        .set_state = set_state,
        .set_average = set_average,
        .set_sum = set_sum,
        .set_grad = set_grad,
        .set_accumulated = set_accumulated,
        .step = step,
        .set_num_threads = set_num_threads,
        .get_num_threads = get_num_threads,
        .set_threading_layer = set_threading_layer,
        .get_threading_layer = get_threading_layer,
        .set_begun = set_begun,
        .get_begun = get_begun,
    };
    static bool begun;
    if (!begun)
        fo_init();
    begun = true;
    return &table;
}
