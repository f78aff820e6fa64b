# A training that stops, saves and goes on ends where one that did not stop ends, bit for bit:
# cmake -DPROGRAM=train_moe -DPLACE=folder -P this
function(train)
  execute_process(COMMAND "${PROGRAM}" --page "${PLACE}/train_moe_continues.html" ${ARGV}
                  OUTPUT_QUIET ERROR_VARIABLE said COMMAND_ERROR_IS_FATAL ANY)
endfunction()
foreach(rule "softmax;--balance;bias" "relu")
  train(--router ${rule} --steps 4 --save "${PLACE}/train_moe_half")
  train(--router ${rule} --steps 4 --resume "${PLACE}/train_moe_half" --save "${PLACE}/train_moe_twice")
  train(--router ${rule} --steps 8 --save "${PLACE}/train_moe_whole")
  foreach(other "twice" "half")
    execute_process(
      COMMAND "${CMAKE_COMMAND}" -E compare_files "${PLACE}/train_moe_${other}"
              "${PLACE}/train_moe_whole" RESULT_VARIABLE differs OUTPUT_QUIET ERROR_QUIET)
    if(other STREQUAL "twice" AND NOT differs EQUAL 0)
      message(FATAL_ERROR "${rule}: what goes on from a checkpoint is another model")
    elseif(other STREQUAL "half" AND differs EQUAL 0)
      message(FATAL_ERROR "${rule}: a checkpoint does not change with training")
    endif()
  endforeach()
endforeach()
