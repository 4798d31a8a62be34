/* Rows that miss steps, as a step sees them. */
#ifndef FO_MISSED_H
#define FO_MISSED_H

#include "plan.h"
#include "team.h"

/* After a step, for each tensor with a log whose gradient was of some rows: notes the step as one
 * that its other rows have missed, and has some rows catch up. */
void fo_log_missed(const fo_step *s, const fo_crew *crew);

#endif
