/* What a call that failed says: for api.c, which includes it alone. */
#ifndef FO_ERRORS_H
#define FO_ERRORS_H

#include "core.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char error[256];

static const char *last_error(void) { return error; }

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static fo_status
fail(fo_status status, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(error, sizeof error, format, values);
    va_end(values);
    return status;
}

static fo_status null_pointer(const char *name)
{
    return fail(FO_BAD_POINTER, "%s must not be NULL", name);
}

/* Appends a name to a list of names, as much of it as there is room for. */
static void enlist(char *list, size_t room, const char *separator, const char *name)
{
    const size_t used = strlen(list);
    snprintf(list + used, room - used, "%s%s", used > 0 ? separator : "", name);
}

/* Says that `name` is none of `names`, which it lists. */
static fo_status bad_name(const fo_rule *rule, const char *what, const char *const *names,
                          const char *name)
{
    char list[128] = "";
    for (; *names; names++)
        enlist(list, sizeof list, " ", *names);
    return fail(FO_BAD_NAME, "%s has no %s named '%.40s', but: %s", rule->name, what, name, list);
}

static fo_status check_between(const char *name, int32_t value, int32_t low, int32_t high)
{
    if (value < low || value > high)
        return fail(FO_BAD_VALUE, "%s must be between %d and %d, got %d", name, (int)low, (int)high,
                    (int)value);
    return FO_OK;
}

static fo_status check_size(const char *type, uint32_t size, size_t right)
{
    if (size != right)
        return fail(FO_BAD_VALUE, "size of %s must be sizeof(%s), %zu in this fastopt, got %lu",
                    type, type, right, (unsigned long)size);
    return FO_OK;
}

#endif
